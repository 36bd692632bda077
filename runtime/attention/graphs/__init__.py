"""Layers as CUDA graphs: what is launched is recorded once, and replayed for other layers of the same shapes."""
