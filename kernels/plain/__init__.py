"""Attention in plain torch: the definition of correct, and what runs on CPUs."""
