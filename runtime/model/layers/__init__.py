"""What is done to the layers of a model before it is trained: fused, or computed in pieces."""
