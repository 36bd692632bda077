"""A whole training step: what surrounds attention, part by part, as time on the busiest GPU."""
