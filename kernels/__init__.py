"""Sparse attention on tensors: masks, choice of patterns, forward and backward partials of every backend."""
