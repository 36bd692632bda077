"""Element masks of partial tiles, in CuTe's language, as flash-attn-4 compiles them into its kernels.

A mask sees local token indexes. Every local tile is one whole mask block, so causality inside a row's own block needs
only offsets within the tile.
"""

from functools import cache
from importlib import import_module
from typing import Any


@cache
def own_block_mask() -> Any:
    """Causality within the row's own block of 128 tokens."""
    cute: Any = import_module("cutlass.cute")

    @cute.jit
    def mask(batch, head, query, key, seqlen_info, aux_tensors):
        return (query & 127) >= (key & 127)

    return mask


@cache
def documents_mask(by_tiles: bool) -> Any:
    """Causality by positions, and one document. It reads int32 positions and documents of queries and of keys.

    by_tiles: the batch index is the query tile, and queries count from 0 in each.
    """
    cutlass: Any = import_module("cutlass")
    cute: Any = import_module("cutlass.cute")
    as_vector = import_module("flash_attn.cute.utils").scalar_to_ssa

    @cute.jit
    def mask(batch, head, query, key, seqlen_info, aux_tensors):
        q_positions, k_positions, q_documents, k_documents = aux_tensors
        row = query[0] + (batch[0] * 128 if cutlass.const_expr(by_tiles) else 0)
        causal = as_vector(k_positions[key[0]], cutlass.Int32) <= as_vector(q_positions[row], cutlass.Int32)
        q_document = as_vector(q_documents[row], cutlass.Int32)
        return causal & (q_document == as_vector(k_documents[key[0]], cutlass.Int32))

    return mask
