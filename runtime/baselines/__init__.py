"""Dense context-parallel attention to compare with: a zigzag ring, and PyTorch's own ring."""
