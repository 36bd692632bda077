"""Dense attention over ranks, to compare with."""
