"""Attention in plain torch: the float64 reference that defines correct, and what runs on CPUs."""
