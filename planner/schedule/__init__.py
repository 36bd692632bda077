"""What ranks compute and send, phase by phase: schedules and what they are made from; no layout, no cost."""
