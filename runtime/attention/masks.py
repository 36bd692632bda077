"""Masks of layers: replayed, admitted by a plan, compared between ranks by their hash, indexed for kernels.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ...kernels import api
from ...kernels.hashing import HASH_MULTIPLIER, hashed_sum, words_of
from ...kernels.mask import AttentionMask
from ...kernels.window import edge_diagonals
from ...planner.schedule.pairs import Pairs, bits_of_diagonals, causal_pairs, documents_share, pairs_of_blocks
from ...planner.schedule.placement import Placement
from ...planner.schedule.schedule import ShardId, Task
from ...traces.errors import InputError
from ...traces.pattern import LayerPattern, VerticalSlash, has_windows
from .heads import Heads

NOTED_BYTES = 1 << 26  # masks wait to be hashed together, up to so many bytes
MaskSource = Callable[[], AttentionMask]


def mask_of(pattern: LayerPattern, *, columns_capacity: int, device: torch.device) -> AttentionMask:
    """Return a layer's patterns as tensors on `device`, with `columns_capacity` column slots per head.

    Raises InputError when a head has more columns than that.
    """
    if pattern.max_columns > columns_capacity:
        raise InputError(f"a head has {pattern.max_columns} columns; the plan has room for {columns_capacity}",
                         field="columns_capacity")  # fmt: skip
    columns = np.full((pattern.num_heads, columns_capacity), pattern.seq_len_tokens, dtype=np.int32)
    for number, head in enumerate(pattern.heads):
        columns[number, : head.columns.size] = head.columns
    mask = AttentionMask(
        seq_len_tokens=pattern.seq_len_tokens,
        block_size=pattern.block_size,
        active=torch.from_numpy(_active(pattern)),
        columns=torch.from_numpy(columns) if columns_capacity else None,
        documents=None if pattern.documents is None else torch.from_numpy(pattern.documents),
        windows=tuple(head.window_tokens for head in pattern.heads) if has_windows(pattern) else None,
        anchors=pattern.anchor_tokens,
    )
    return mask.to(device)


def with_capacity(mask: AttentionMask, columns_capacity: int) -> AttentionMask:
    """Return the mask with exactly `columns_capacity` column slots; InputError when it needs more."""
    if mask.column_capacity == columns_capacity:
        return mask
    if mask.column_capacity > columns_capacity:
        raise InputError(
            f"the selector may choose {mask.column_capacity} columns; the plan has room for {columns_capacity}",
            field="columns_capacity",
        )
    heads, missing = mask.heads, columns_capacity - mask.column_capacity
    empty = torch.full((heads, missing), mask.seq_len_tokens, dtype=torch.int32, device=mask.active.device)
    return replace(mask, columns=empty if mask.columns is None else torch.cat([mask.columns, empty], dim=1))


def mask_pairs(mask: AttentionMask, placement: Placement) -> Pairs:
    """Return the (query part, key part) pairs that a mask needs. Waits for the device."""
    active = mask.active.any(0).cpu().numpy()
    bits = bits_of_diagonals(active) if mask.is_toeplitz else np.tril(active)
    cut: np.ndarray = np.logical_or.reduce(cut_diagonals(mask), axis=0)
    bits = bits | bits_of_diagonals(cut)
    documents = None if mask.documents is None else mask.documents.cpu().numpy()
    bits = documents_share(documents, mask.block_size, mask.seq_len_tokens, bits)
    return pairs_of_blocks(bits, placement, block_size=mask.block_size)


def cut_diagonals(mask: AttentionMask) -> np.ndarray:
    """Return bool [H, N]: the block diagonals that each head's window cuts, active ones among them."""
    cut = np.zeros((mask.heads, mask.blocks), dtype=bool)
    for head, window in enumerate(mask.windows or ()):
        cut[head, list(edge_diagonals(window, mask.block_size, mask.blocks))] = True
    return cut


class PairGuard:
    """Refuses masks that activate a pair of shards which the plan leaves out: they would be computed wrongly.

    Each mask is looked at once, on the host. Where only what no causal mask activates is left out, none is.
    """

    def __init__(self, pairs: Pairs, placement: Placement) -> None:
        self._pairs, self._placement = pairs, placement
        self._needless = pairs.covers(causal_pairs(placement))
        self._admitted: set[int] = set()

    def admit(self, mask: AttentionMask) -> None:
        """Raise InputError, naming the first such pair, unless the mask needs none."""
        if self._needless or id(mask) in self._admitted:
            return
        self._pairs.require(mask_pairs(mask, self._placement), about="the mask")
        self._admitted.add(id(mask))
        weakref.finalize(mask, self._admitted.discard, id(mask))  # another mask may have its id then


def _active(pattern: LayerPattern) -> np.ndarray:
    """Return bool [H, N] when all heads are made of diagonals, else [H, N, N]: what is attended whole."""
    blocks = pattern.num_blocks
    whole = [_diagonal_flags(head, blocks) for head in pattern.heads if isinstance(head, VerticalSlash)]
    if len(whole) == pattern.num_heads:
        return np.stack(whole)
    return np.stack([
        bits_of_diagonals(_diagonal_flags(head, blocks)) if isinstance(head, VerticalSlash) else head.bits
        for head in pattern.heads
    ])  # fmt: skip


def _diagonal_flags(head: VerticalSlash, blocks: int) -> np.ndarray:
    flags = np.zeros(blocks, dtype=bool)
    flags[head.whole] = True
    return flags


def pattern_hash(masks: Sequence[AttentionMask]) -> torch.Tensor:
    """Return an int64 scalar on the masks' device that differs, but for chance, when two lists of masks do.

    Does not wait. At least one mask.
    """
    parts = [part for mask in masks for part in (mask.active, mask.columns) if part is not None]
    first, total = 1, torch.zeros((), dtype=torch.int64, device=masks[0].active.device)
    for words in map(words_of, parts):
        total = total + _hash_function(words.device)(words, first)
        first += words.numel()
    others = sum(
        hash((number, mask.windows or (), mask.anchors))  # None has another hash in each process
        for number, mask in enumerate(masks)
        if mask.windows is not None or mask.anchors
    )
    return total + others % (1 << 62)


def _hash_function(device: torch.device) -> Callable[[Tensor, int], Tensor]:
    """Return what hashes words on a device: torch's operations, on GPUs one launch."""
    if device.type != "cuda":
        return hashed_sum
    from ...kernels.triton.hashing import launch_hashed_sum  # triton cannot be imported everywhere

    return launch_hashed_sum


class RunningHash:
    """The hash of all masks noted since it was last taken; noting launches nothing, away from the layers' kernels."""

    def __init__(self, device: torch.device) -> None:
        self._value = torch.zeros((), dtype=torch.int64, device=device)
        self._noted: list[AttentionMask] = []
        self._bytes = 0

    def note(self, mask: AttentionMask) -> None:
        """Add a mask. It must not change before the hash is taken."""
        self._noted.append(mask)
        self._bytes += mask.active.nbytes + (0 if mask.columns is None else mask.columns.nbytes)
        if self._bytes > NOTED_BYTES:
            self._add_noted()

    def take(self) -> torch.Tensor:
        """Return the hash, an int64 scalar on the device, and begin anew. Does not wait."""
        self._add_noted()
        value, self._value = self._value, torch.zeros_like(self._value)
        return value

    def _add_noted(self) -> None:
        if self._noted:
            self._value = self._value * HASH_MULTIPLIER + pattern_hash(self._noted)
        self._noted, self._bytes = [], 0


@dataclass(eq=False, kw_only=True)
class Indexes:
    """Indexes of one shard's queries, made when first needed and kept for backward.

    positions: int64 [S] of every rank's tokens; joined_positions: those of several ranks, kept by the caller; rank:
    whose queries. The mask may be chosen while the first transfers are in flight; `chosen` is told when it is.
    """

    source: AttentionMask | MaskSource | None
    positions: list[Tensor]
    rank: int
    backend: str
    columns_capacity: int
    joined_positions: dict[tuple[int, ...], Tensor]
    chosen: Callable[[AttentionMask], None]
    _mask: AttentionMask | None = field(default=None, init=False)
    _blocks: dict[tuple[int, ...], api.BlockIndex] = field(default_factory=dict, init=False)
    _columns: api.ColumnIndex | None = field(default=None, init=False)
    _parts: dict[tuple[int, Heads], Indexes] = field(default_factory=dict, init=False)

    def part(self, query: ShardId, heads: Heads) -> Indexes:
        """Those of a shard's queries, for some heads of the same mask."""
        key = query.sequence_part, heads
        if key not in self._parts:
            if key == (self.rank, (0, self.mask.heads)):
                return self
            self._parts[key] = replace(
                self, source=lambda: self.mask.of_heads(slice(*heads)), rank=key[0], chosen=lambda mask: None
            )
        return self._parts[key]

    @property
    def known(self) -> bool:
        """Whether the mask need not be chosen first."""
        return self._mask is not None or isinstance(self.source, AttentionMask)

    @property
    def mask(self) -> AttentionMask:
        """The layer's mask; ValueError when it has another number of column slots than the plan."""
        if self._mask is None:
            assert self.source is not None
            mask = self.source if isinstance(self.source, AttentionMask) else self.source()
            if mask.column_capacity != self.columns_capacity:
                raise ValueError(f"the mask has {mask.column_capacity} column slots, the plan {self.columns_capacity}")
            self._mask = mask
            self.chosen(mask)
            self.source = None  # it holds q and k, which must not live until backward
        return self._mask

    def block(self, tasks: Sequence[Task]) -> api.BlockIndex:
        """The index of the queries against the key shards of these tasks, one after the other."""
        parts = tuple(task.key.sequence_part for task in tasks if task.key is not None)
        if parts not in self._blocks:
            if parts not in self.joined_positions:
                joined = [self.positions[part] for part in parts]
                self.joined_positions[parts] = joined[0] if len(joined) == 1 else torch.cat(joined)
            own, keys = self.positions[self.rank], self.joined_positions[parts]
            self._blocks[parts] = api.block_index(self.mask, own, keys, backend=self.backend)
        return self._blocks[parts]

    def columns(self) -> api.ColumnIndex:
        """The index of the queries against the gathered columns."""
        if self._columns is None:
            self._columns = api.column_index(self.mask, self.positions[self.rank], backend=self.backend)
        return self._columns
