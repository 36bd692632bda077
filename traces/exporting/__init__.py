"""Timelines in the forms that other tools read: `sparsering export`."""
