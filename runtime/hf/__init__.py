"""Hugging Face models: audited, their attention replaced by a plan's, captured, loaded from local files."""
