"""Choosing patterns from queries and keys: one selector a file, and what selectors share."""

DEFAULT_SELECTOR = "vertical-slash"
