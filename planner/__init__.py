"""Who computes what, when: placements, schedules, their proof, their cost, the search. Never imports torch."""
