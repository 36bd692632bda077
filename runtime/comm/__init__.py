"""Ranks: how they join, what travels between them on which streams, and how a lost one is named."""
