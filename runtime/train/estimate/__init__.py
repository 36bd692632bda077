"""How long a training run will take, how much memory it will need: from a configuration and a cluster's description."""
