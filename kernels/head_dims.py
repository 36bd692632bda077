"""Which head dims the Triton kernels have, and how heads of other sizes get by with them.

Attention computes heads in between with zeros behind them (padded.py). What goes element by element over a head, copies
and sums of products, takes a head in pieces instead, and copies nothing.
"""

from __future__ import annotations

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
# Kernels that choose patterns hold more of a head at once; others are chosen for in plain torch.
CHOOSING_HEAD_DIMS = HEAD_DIMS[:4]
# In 16 bits so many elements are the 16 bytes that rows of a head are aligned to.
PADDED_STEP = 8


def kernel_head_dim(head_dim: int) -> int:
    """What the kernels compute heads of `head_dim` elements as: the same, or the next that they have.

    Raises ValueError for what is larger than all of them, or no multiple of PADDED_STEP.
    """
    found = next((have for have in HEAD_DIMS if have >= head_dim), None)
    if found is None or head_dim < 1 or head_dim % PADDED_STEP:
        raise ValueError(
            f"q: head dim {head_dim} is not one of {HEAD_DIMS}, nor another multiple of {PADDED_STEP} below "
            f"{HEAD_DIMS[-1]} (triton backend)"
        )
    return found


def pieces(head_dim: int) -> list[slice]:
    """Cut the elements of a head into runs of powers of two, the longest first: a single one where it is one itself."""
    cut, start = [], 0
    while start < head_dim:
        size = 1 << ((head_dim - start).bit_length() - 1)
        cut.append(slice(start, start + size))
        start += size
    return cut
