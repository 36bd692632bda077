"""Which key tiles each query tile visits, and the reverse: the indexes behind the Triton kernels.

A *row* is a local query tile (or, transposed, a local key tile); it visits local tiles of the other side. Every local
tile must be exactly one mask block, so a visited tile needs no element mask, except the row's own block (causality and
the ragged tail meet only there), which is kept apart as the row's `diagonal`.

Two sources of one format: *Toeplitz*, where the other side's blocks are an arithmetic progression (block striping, or
the whole sequence): rows of one residue share one sorted list of diagonals, and an entry is a number of strides; and
*CSR*, one list of tiles per row, for block masks and irregular placements. Everything that depends on the mask is
computed on its device; only CSR indexes of very many possible entries wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..mask import AttentionMask, document_of
from .csr import csr_lists
from .device_lists import residue_lists, row_fields
from .periodic import PeriodicTables, periodic_lists, periodic_tables

ResidueLists = tuple[Tensor, Tensor, int]  # entries, before, stride: see index_kernels.py


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
        return sum(t.numel() * t.element_size() for t in (self.rows, self.entries, self.order))


@dataclass(frozen=True, kw_only=True)
class Side:
    """The tiles of one shard, or of several gathered ones: their mask blocks, on the host and on the device.

    ascending: blocks rise, so that valid tokens are a prefix. Gathered shards do not; their padding, never visited,
    counts as valid.
    """

    blocks: np.ndarray
    ascending: bool
    device_blocks: Tensor
    tokens: int
    last_block_tokens: int

    def stride(self) -> int | None:
        """The common difference of the blocks (1 for a single tile), or None where there is none."""
        if len(self.blocks) < 2:
            return 1
        if not self.ascending:
            return None
        steps = np.diff(self.blocks)
        return int(steps[0]) if (steps == steps[0]).all() else None

    def order(self, *, falling: bool) -> Tensor:
        """int32 [T]: local tiles by falling or rising block, kept on the device. Long rows first in a causal mask."""
        known = self.__dict__.setdefault("_order", {})
        if falling not in known:
            order = np.argsort(-self.blocks if falling else self.blocks, kind="stable").astype(np.int32)
            known[falling] = torch.from_numpy(order).to(self.device_blocks.device)
        return known[falling]

    def own_tiles(self, others: Side) -> Tensor:
        """int64 [T]: the other side's local tile of each block held here, or -1; kept on the device."""
        known = self.__dict__.setdefault("_own_tiles", {})
        if id(others) not in known:
            rising = np.argsort(others.blocks, kind="stable")
            at = np.searchsorted(others.blocks, self.blocks, sorter=rising)
            found = at < len(others.blocks)
            at[found] = rising[at[found]]
            found[found] = others.blocks[at[found]] == self.blocks[found]
            tiles = torch.from_numpy(np.where(found, at, -1)).to(self.device_blocks.device)
            known[id(others)] = others, tiles  # the reference keeps the id taken
        return known[id(others)][1]

    def periodic_tables(self, others: Side, blocks: int, *, transposed: bool) -> PeriodicTables | None:
        """The tables of index_periodic for these rows and others, kept on the device; None where there is no period."""
        known = self.__dict__.setdefault("_periodic", {})
        key = id(others), blocks, transposed
        if key not in known:
            tables = periodic_tables(
                self.blocks, others.blocks, blocks=blocks, transposed=transposed, device=self.device_blocks.device
            )
            known[key] = others, tables  # the reference keeps the id taken
        return known[key][1]

    def tile_of_block(self, blocks: int) -> Tensor:
        """int32 [blocks]: the local tile of each mask block, or -1; kept on the device."""
        known = self.__dict__.setdefault("_tile_of_block", {})
        if blocks not in known:
            tiles = np.full(blocks, -1, dtype=np.int32)
            inside = self.blocks < blocks
            tiles[self.blocks[inside]] = np.flatnonzero(inside)
            known[blocks] = torch.from_numpy(tiles).to(self.device_blocks.device)
        return known[blocks]

    def valid_tiles(self, mask: AttentionMask) -> int:
        """Tiles that hold at least one valid token: a prefix."""
        return int((self.blocks < mask.blocks).sum()) if self.ascending else len(self.blocks)

    def valid_tokens(self, mask: AttentionMask) -> int:
        """Tokens before the padding; counted once for a length."""
        if not self.ascending:
            return self.tokens
        known = self.__dict__.setdefault("_valid_tokens", {})
        key = mask.seq_len_tokens, mask.block_size
        if key not in known:
            sizes = np.full(len(self.blocks), mask.block_size)
            if len(sizes):
                sizes[-1] = self.last_block_tokens
            known[key] = int(np.clip(mask.seq_len_tokens - self.blocks * mask.block_size, 0, sizes).sum())
        return known[key]


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
    tail = len(host) - (len(blocks) - 1) * block_size if len(blocks) else 0
    device_blocks = torch.from_numpy(blocks.astype(np.int32)).to(device)
    return Side(
        blocks=blocks, ascending=ascending, device_blocks=device_blocks, tokens=len(host), last_block_tokens=tail
    )


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
        return _lists(self.mask, self.q_side, self.k_side, transposed=False, residues=self._residues(self.k_side))

    @cached_property
    def keys(self) -> TileLists:
        """Rows are key tiles: for dK and dV."""
        return _lists(self.mask, self.k_side, self.q_side, transposed=True, residues=self._residues(self.q_side))

    def _residues(self, side: Side) -> ResidueLists | None:
        """Diagonals by residue for a side whose blocks are an arithmetic progression; both directions share them."""
        stride = side.stride()
        if not self.mask.is_toeplitz or stride is None:
            return None
        known = self.__dict__.setdefault("_by_stride", {})
        if stride not in known:
            known[stride] = *residue_lists(self.mask.active, stride), stride
        return known[stride]

    @property
    def nbytes(self) -> int:
        """Device memory held by both directions."""
        return self.queries.nbytes + self.keys.nbytes


def block_task(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> BlockTask:
    """The index of one task from the global positions of its tokens, [S_q] and [S_k].

    Raises ValueError when the local tiles are not whole mask blocks.
    """
    q_side = side_of(q_positions, mask.block_size, mask.active.device, name="q_positions")
    k_side = side_of(k_positions, mask.block_size, mask.active.device, name="k_positions", gathered=True)
    q_documents, k_documents = (_local_documents(mask, p) for p in (q_positions, k_positions))
    return BlockTask(
        mask=mask,
        q_side=q_side,
        k_side=k_side,
        q_valid_tokens=q_side.valid_tokens(mask),
        k_valid_tokens=k_side.valid_tokens(mask),
        q_documents=q_documents,
        k_documents=k_documents,
    )


def _local_documents(mask: AttentionMask, positions: Tensor) -> Tensor | None:
    documents = document_of(mask, positions.to(mask.active.device))
    return None if documents is None else documents.to(torch.int32)


def _lists(
    mask: AttentionMask, rows: Side, others: Side, *, transposed: bool, residues: ResidueLists | None = None
) -> TileLists:
    if residues is not None:
        return _toeplitz_lists(mask, rows, others, residues, transposed=transposed)
    tables = rows.periodic_tables(others, mask.blocks, transposed=transposed) if mask.is_toeplitz else None
    if tables is not None:
        given = mask.active, tables, rows.device_blocks, rows.own_tiles(others)
        fields, entries = periodic_lists(*given, transposed=transposed)
        return TileLists(rows=fields, entries=entries, order=rows.order(falling=not transposed), sign=1)
    sides = (rows.blocks, rows.device_blocks), (others.blocks, others.device_blocks)
    starts, counts, entries = csr_lists(mask, *sides, transposed=transposed)
    diagonal = _diagonal_tiles(mask, rows, others)
    if mask.is_toeplitz:
        order = rows.order(falling=not transposed)
    else:
        work = counts.sum(0) + (diagonal >= 0).sum(0)
        order = torch.argsort(work, descending=True, stable=True).to(torch.int32)
    fields = torch.stack([starts, counts, torch.zeros_like(counts), diagonal], dim=-1).to(torch.int32)
    return TileLists(rows=fields.contiguous(), entries=entries.to(torch.int32), order=order, sign=1)


def _toeplitz_lists(
    mask: AttentionMask, rows: Side, others: Side, residues: ResidueLists, *, transposed: bool
) -> TileLists:
    """Rows of one residue share a sorted list of diagonals; no row has a list of its own. See index_kernels.py."""
    entries, before, stride = residues
    first = int(others.blocks[0]) if len(others.blocks) else 0
    fields = row_fields(
        mask.active,
        rows.device_blocks,
        before,
        stride=stride,
        first=first,
        others=others.valid_tiles(mask),
        transposed=transposed,
    )
    return TileLists(
        rows=fields, entries=entries, order=rows.order(falling=not transposed), sign=1 if transposed else -1
    )


def _diagonal_tiles(mask: AttentionMask, rows: Side, others: Side) -> Tensor:
    """[H, T]: the other side's local tile of each row's own block where that pair is active, else -1."""
    tiles = rows.own_tiles(others)
    blocks = rows.device_blocks.long()
    tiles = torch.where(blocks < mask.blocks, tiles, -1)
    blocks = blocks.clamp(max=mask.blocks - 1)
    active = mask.active[:, :1].expand(-1, len(rows.blocks)) if mask.is_toeplitz else mask.active[:, blocks, blocks]
    return torch.where(active, tiles[None, :], -1)
