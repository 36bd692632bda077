"""One layer's attention over ranks, as a plan says."""
