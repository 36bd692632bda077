"""Ranks, and what travels between them."""
