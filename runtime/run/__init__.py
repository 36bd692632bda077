"""`sparsering run`: one layer of a plan executed, verified in float64 and measured."""
