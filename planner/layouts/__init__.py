"""Builders of schedules, one layout a file."""
