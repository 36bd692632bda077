"""Schedules played on real processes and GPUs; capture from and attachment to Hugging Face models."""
