"""What kernels are given beside the tensors that they load tiles of: tensors and numbers that belong together.

Fields hold torch tensors and ints where kernels are launched, pointers and values in a kernel; None is known when a
kernel is compiled, and leaves out what it belongs to. Sources of tiles are arguments of their own, since Triton 3.6
takes tensor descriptors nowhere else; their strides are here. (Whole views are never compared with None in a kernel:
Triton 3.6 cannot.) Shape legend: T tiles of a shard, otherwise that of tiles.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Strides(NamedTuple):
    """Elements from one batch entry, token and head of [B, S, H, D] to the next."""

    b: Any
    s: Any
    h: Any

    @classmethod
    def of(cls, x: Tensor) -> Strides:
        """Those of a tensor."""
        return cls(*x.stride()[:3])


NO_STRIDES = Strides(None, None, None)


class Tiles(NamedTuple):
    """A tensor [B, S, H, D] whose tiles are loaded by pointers."""

    data: Any
    at: Strides

    @classmethod
    def of(cls, x: Tensor) -> Tiles:
        """A tensor with its strides."""
        return cls(x, Strides.of(x))


class Rows(NamedTuple):
    """One value a query [B, H, S], side by side along S: lse."""

    data: Any
    b: Any
    h: Any

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """A tensor with its strides."""
        return cls(x, *x.stride()[:2])


class Scale(NamedTuple):
    """The factor of gradients of scores, and what scores are multiplied with for powers of two.

    softcap: before that, products become tanh(x) where 2 to the power of this times the product is exp(2 x); None
    without a softcap.
    """

    natural: Any
    log2: Any
    softcap: Any = None


class TileStrides(NamedTuple):
    """Strides of what a launch loads and writes tiles of. `out` is out or dQ."""

    q: Strides = NO_STRIDES
    out: Strides = NO_STRIDES
    grad_out: Strides = NO_STRIDES
    k: Strides = NO_STRIDES
    v: Strides = NO_STRIDES
    column_k: Strides = NO_STRIDES
    column_v: Strides = NO_STRIDES
    grad_k: Strides = NO_STRIDES
    grad_v: Strides = NO_STRIDES


def strides_of(**tensors: Tensor) -> TileStrides:
    """The strides of these tensors, which are named as TileStrides' fields."""
    return TileStrides(**{name: Strides.of(x) for name, x in tensors.items()})


class QueryTiles(NamedTuple):
    """The query side: order int32 [T] of its tiles, documents int32 [S_q], H, T, and how many tokens are valid."""

    order: Any
    documents: Any
    heads: Any
    tiles: Any
    valid: Any


class BlockLists(NamedTuple):
    """Lists of the block part's tiles, see index/block.py, and the key side: documents int32 [S_k], valid tokens.

    edges: of tiles that a window cuts, see index/edges.py; None where there are none.
    """

    fields: Any = None
    entries: Any = None
    documents: Any = None
    valid: Any = None
    edges: Any = None


class KeyRows(NamedTuple):
    """Which key tiles a launch computes: order[first : first + number] of T; H_kv."""

    order: Any
    first: Any
    number: Any
    tiles: Any
    kv_heads: Any


class ColumnLists(NamedTuple):
    """The columns [H, C] and which of them a query tile may attend, see index/columns.py.

    q_blocks int32 [T], mask blocks of the query tiles: None where neither a column lies in a query's own block,
    inactive, nor in one that a window cuts. windows int32 [H], None without. anchors: how many of the first columns are
    attended by rows of other documents too, None without.
    """

    positions: Any = None
    usable: Any = None
    limits: Any = None
    documents: Any = None
    q_blocks: Any = None
    capacity: Any = None
    words: Any = None
    windows: Any = None
    anchors: Any = None


class ColumnChunks(NamedTuple):
    """How dK/dV of columns are cut: int32 [H, column_tiles] and [H], see index/columns.py; query tiles of a chunk."""

    first_tile: Any
    has_own: Any
    column_tiles: Any
    chunk_tiles: Any
