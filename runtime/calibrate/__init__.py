"""Measuring what attention costs on this machine: kernels, indexes, the host, links."""
