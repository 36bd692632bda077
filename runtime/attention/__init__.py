"""One layer's attention over ranks, as a plan says: a differentiable call that plays schedules."""
