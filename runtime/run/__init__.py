"""`sparsering run`: a plan executed, verified and measured."""
