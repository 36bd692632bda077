"""Selectors that choose for every row of blocks by itself: one a file, and what they share."""
