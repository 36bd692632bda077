"""Entry points for Hugging Face models: attach, capture, audit."""
