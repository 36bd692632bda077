"""`sparsering demo`: train, capture, plan, simulate, run and report on this machine, without a GPU."""
