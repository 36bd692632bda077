"""Doors for Hugging Face models: attach, capture, audit."""
