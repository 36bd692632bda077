"""Where the time of a training step goes: attention, choosing, exposed communication."""
