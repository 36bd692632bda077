"""Proof that a schedule, whoever built it, computes one layer of attention."""
