"""Schedules played in simulated time on a described cluster, and the reports about it. Never imports torch."""
