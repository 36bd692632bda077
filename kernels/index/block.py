"""Which key tiles each query tile visits, and the reverse: the indexes behind the Triton kernels.

A *row* is a local query tile (or, transposed, a local key tile); it visits local tiles of the other side. Every local
tile must be exactly one mask block, so a visited tile needs no element mask, except the row's own block (causality and
the ragged tail meet only there), which is kept apart as the row's `diagonal`, and at most two whose pairs a sliding
window cuts: the row's `edges`.

Two sources of one format: *Toeplitz*, where the other side's blocks are an arithmetic progression (block striping, or
the whole sequence): rows of one residue share one sorted list of diagonals, and an entry is a number of strides; and
*CSR*, one list of tiles per row, for block masks and irregular placements. Everything that depends on the mask is
computed on its device; only CSR indexes of very many possible entries wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..mask import AttentionMask, document_of, document_reach
from .device_lists import csr_lists, periodic_lists, residue_lists, row_fields
from .edges import edge_fields
from .periodic import PeriodicTables, periodic_tables

ResidueLists = tuple[Tensor, Tensor, int]  # entries, before, stride: see device_lists.py
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TileLists:
    """For each (head, row): the tiles of the other side that it visits, its own block excepted.

    rows int32 [H, T, 4]: start and count of the row's entries, base, and the local tile of the row's own block (-1 if
    that pair is not active or not here). A visited tile is base + sign * entry. entries int32 [E].
    order int32 [T]: rows by falling work, all heads taken together: long rows first, neighbours together.
    """

    rows: Tensor
    entries: Tensor
    order: Tensor
    sign: int

    @property
    def nbytes(self) -> int:
        """Device memory held."""
        return self.rows.nbytes + self.entries.nbytes + self.order.nbytes


def kept(make: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method whose results are kept with its object, by its arguments."""

    @wraps(make)
    def method(self: Any, *given: P.args, **named: P.kwargs) -> T:
        known = self.__dict__.setdefault(f"_{make.__name__}", {})
        key = (*given, *named.values())
        if key not in known:
            known[key] = make(self, *given, **named)
        return known[key]

    return method


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """The tiles of one shard, or of several gathered ones: their mask blocks, on the host and on the device.

    ascending: blocks rise, so that valid tokens are a prefix. Gathered shards do not; their padding, never visited,
    counts as valid.
    """

    blocks: np.ndarray
    ascending: bool
    device_blocks: Tensor
    tokens: int

    def stride(self) -> int | None:
        """The common difference of the blocks (1 for a single tile), or None where there is none."""
        if len(self.blocks) < 2:
            return 1
        if not self.ascending:
            return None
        steps = np.diff(self.blocks)
        return int(steps[0]) if (steps == steps[0]).all() else None

    @kept
    def order(self, *, falling: bool) -> Tensor:
        """int32 [T]: local tiles by falling or rising block, on the device. Long rows first in a causal mask."""
        order = np.argsort(-self.blocks if falling else self.blocks, kind="stable").astype(np.int32)
        return torch.from_numpy(order).to(self.device_blocks.device)

    @kept
    def own_tiles(self, others: Side) -> Tensor:
        """int64 [T]: the other side's local tile of each block held here, or -1; on the device."""
        rising = np.argsort(others.blocks, kind="stable")
        at = np.searchsorted(others.blocks, self.blocks, sorter=rising)
        found = at < len(others.blocks)
        at[found] = rising[at[found]]
        found[found] = others.blocks[at[found]] == self.blocks[found]
        return torch.from_numpy(np.where(found, at, -1)).to(self.device_blocks.device)

    @kept
    def periodic_tables(self, others: Side, blocks: int, *, transposed: bool) -> PeriodicTables | None:
        """The tables of periodic.py for these rows and others, on the device; None where there is no period."""
        device = self.device_blocks.device
        return periodic_tables(self.blocks, others.blocks, blocks=blocks, transposed=transposed, device=device)

    @kept
    def tile_of_block(self, blocks: int) -> Tensor:
        """int32 [blocks]: the local tile of each mask block, or -1; on the device."""
        tiles = np.full(blocks, -1, dtype=np.int32)
        inside = self.blocks < blocks
        tiles[self.blocks[inside]] = np.flatnonzero(inside)
        return torch.from_numpy(tiles).to(self.device_blocks.device)

    def valid_tiles(self, mask: AttentionMask) -> int:
        """Tiles that hold at least one valid token: a prefix."""
        return int((self.blocks < mask.blocks).sum()) if self.ascending else len(self.blocks)

    @kept
    def valid_tokens(self, seq_len_tokens: int, block_size: int) -> int:
        """Tokens before the padding."""
        if not self.ascending:
            return self.tokens
        sizes = np.full(len(self.blocks), block_size)
        sizes[-1:] = self.tokens - (len(sizes) - 1) * block_size
        return int(np.clip(seq_len_tokens - self.blocks * block_size, 0, sizes).sum())


_SIDES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def side_of(positions: Tensor, block_size: int, device: torch.device, *, name: str, gathered: bool = False) -> Side:
    """The tiles of a shard from its token positions [S]. Reading them waits for the device once per tensor.

    gathered: allow several shards one after the other, each of whole blocks. Raises ValueError when a local tile of
    block_size tokens is not exactly one mask block.
    """
    known: dict[Any, Side] = _SIDES.setdefault(positions, {})  # pyright: ignore[reportAssignmentType]
    key = (block_size, device, gathered, 0 if positions.is_inference() else positions._version)
    if key not in known:
        known[key] = _read_side(positions, block_size, device, name, gathered)
    return known[key]


def _read_side(positions: Tensor, block_size: int, device: torch.device, name: str, gathered: bool) -> Side:
    host = positions.detach().cpu().numpy().astype(np.int64)
    blocks = host[::block_size] // block_size
    expected = (blocks[:, None] * block_size + np.arange(block_size)).ravel()[: len(host)]
    whole = (host == expected).all() and len(np.unique(blocks)) == len(blocks)
    ascending = bool((np.diff(blocks) > 0).all())
    if not whole or not (ascending or (gathered and len(host) % block_size == 0)):
        at = int(np.flatnonzero(host != expected)[0]) if (host != expected).any() else 0
        raise ValueError(
            f"{name}: local tokens are no ascending whole blocks of {block_size} tokens (token {at} is at "
            f"position {host[at]}); the triton backend needs a granularity that is a multiple of them"
        )
    device_blocks = torch.from_numpy(blocks.astype(np.int32)).to(device)
    return Side(blocks=blocks, ascending=ascending, device_blocks=device_blocks, tokens=len(host))


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """The index of one (query shard, key shard) task of a mask, on the mask's device."""

    mask: AttentionMask
    q_side: Side
    k_side: Side
    q_valid_tokens: int
    k_valid_tokens: int
    q_documents: Tensor | None
    k_documents: Tensor | None

    @cached_property
    def queries(self) -> TileLists:
        """Rows are query tiles."""
        return _lists(
            self.mask, self.q_side, self.k_side, transposed=False, residues=self._residues(self.k_side.stride())
        )

    @cached_property
    def keys(self) -> TileLists:
        """Rows are key tiles: for dK and dV."""
        return _lists(
            self.mask, self.k_side, self.q_side, transposed=True, residues=self._residues(self.q_side.stride())
        )

    @cached_property
    def query_edges(self) -> Tensor | None:
        """Tiles that windows cut, of query tiles: see edges.py. None without windows."""
        tiles = self.k_side.tile_of_block(self.mask.blocks)
        return edge_fields(self.mask, self.q_side.device_blocks, tiles, transposed=False)

    @cached_property
    def key_edges(self) -> Tensor | None:
        """The same of key tiles."""
        tiles = self.q_side.tile_of_block(self.mask.blocks)
        return edge_fields(self.mask, self.k_side.device_blocks, tiles, transposed=True)

    @kept
    def _residues(self, stride: int | None) -> ResidueLists | None:
        """Diagonals by residue, for a side whose blocks are an arithmetic progression; both directions share them."""
        if not self.mask.is_toeplitz or stride is None:
            return None
        return *residue_lists(self.mask.active, stride), stride

    @property
    def nbytes(self) -> int:
        """Device memory held by both directions."""
        edges = [fields.nbytes for fields in (self.query_edges, self.key_edges) if fields is not None]
        return self.queries.nbytes + self.keys.nbytes + sum(edges)


def block_task(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> BlockTask:
    """The index of one task from the global positions of its tokens, [S_q] and [S_k].

    Raises ValueError when the local tiles are not whole mask blocks.
    """
    q_side = side_of(q_positions, mask.block_size, mask.active.device, name="q_positions")
    k_side = side_of(k_positions, mask.block_size, mask.active.device, name="k_positions", gathered=True)
    return BlockTask(
        mask=mask,
        q_side=q_side,
        k_side=k_side,
        q_valid_tokens=q_side.valid_tokens(mask.seq_len_tokens, mask.block_size),
        k_valid_tokens=k_side.valid_tokens(mask.seq_len_tokens, mask.block_size),
        q_documents=documents_at(mask, q_positions),
        k_documents=documents_at(mask, k_positions),
    )


def documents_at(mask: AttentionMask, positions: Tensor) -> Tensor | None:
    """Documents of global token positions, int32 on the mask's device; None without documents."""
    documents = document_of(mask, positions.to(mask.active.device))
    return None if documents is None else documents.to(torch.int32)


def _lists(
    mask: AttentionMask, rows: Side, others: Side, *, transposed: bool, residues: ResidueLists | None
) -> TileLists:
    own = rows.own_tiles(others)
    sides = (rows.blocks, rows.device_blocks), (others.blocks, others.device_blocks)
    if not mask.is_toeplitz:
        fields, entries, work = csr_lists(mask, *sides, own, transposed=transposed)
        order = torch.argsort(work, descending=True, stable=True).to(torch.int32)
        return TileLists(rows=fields, entries=entries, order=order, sign=1)
    order, reach = rows.order(falling=not transposed), document_reach(mask, transposed=transposed)
    if residues is not None:  # rows of one residue share a sorted list of diagonals; no row has a list of its own
        entries, before, stride = residues
        first = int(others.blocks[0]) if len(others.blocks) else 0
        given = mask.active, rows.device_blocks, before, reach
        tiles = others.valid_tiles(mask)
        fields = row_fields(*given, stride=stride, first=first, others=tiles, transposed=transposed)
        return TileLists(rows=fields, entries=entries, order=order, sign=1 if transposed else -1)
    tables = rows.periodic_tables(others, mask.blocks, transposed=transposed)
    if tables is not None:
        fields, entries = periodic_lists(mask.active, tables, rows.device_blocks, own, reach, transposed=transposed)
    else:
        fields, entries, _ = csr_lists(mask, *sides, own, transposed=transposed)
    return TileLists(rows=fields, entries=entries, order=order, sign=1)
