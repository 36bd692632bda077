"""Studies of learning: which arms are trained and how they are judged, fixed in a file before any of them runs."""
