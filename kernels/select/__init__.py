"""Choosing patterns from queries and keys."""
