"""Checking, tuning and cross-compiling kernels."""
