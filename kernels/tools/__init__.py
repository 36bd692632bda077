"""Checking, tuning and cross-compiling the kernels: `sparsering doctor`."""
