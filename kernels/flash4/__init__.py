"""The flash4 backend: flash-attn-4 for the block part."""
