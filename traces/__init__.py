"""What a model attends to: patterns, traces on disk, synthetic ones, timelines; files and errors for all."""
