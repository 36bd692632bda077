"""`sparsering demo`: the whole road on this machine."""
