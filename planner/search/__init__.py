"""From a trace and a cluster to a plan: candidates, scores, and whether planning was worth it."""
