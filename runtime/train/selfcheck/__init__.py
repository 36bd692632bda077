"""Sampled checks of a training run by itself: attention against its definition, states and data against each other."""
