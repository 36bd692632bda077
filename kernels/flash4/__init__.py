"""The flash4 backend: the block part by the flash-attn-4 wheels, columns by the Triton kernels."""
