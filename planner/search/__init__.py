"""From a trace and a cluster to a plan."""
