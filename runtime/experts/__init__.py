"""Models with experts: the load-balancing loss of their routers over all ranks, and how evenly experts are used."""
