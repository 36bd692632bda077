"""`sparsering doctor`: what this machine has, what of it works, and what mends the rest. Imports no torch of itself."""
