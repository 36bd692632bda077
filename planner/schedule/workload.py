"""How much work a pattern makes under a placement: what launches cost follows from these counts.

The unit is a *tile pair*: block_size local query tokens against block_size local key tokens of one head. Under a
placement whose granularity is a multiple of the block size a tile is exactly one mask block; under token striping a
tile holds tokens of many mask blocks, and a pair is active as soon as one of its block pairs is.

Block pairs that a window's edge cuts are whole pairs here: kernels compute them whole and mask them. Gathered columns
are counted in whole tiles, whatever blocks hold some of their tokens already, cut ones or not.

Shape legend: W ranks, H query heads, N mask blocks, T tiles per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ...traces.pattern import HeadPattern, LayerPattern, VerticalSlash
from .active import CONVOLVED_RANKS, active_pairs, convolved, counted_along, keys_of_queries
from .placement import Placement

RowLengths = tuple[NDArray[np.int64], NDArray[np.int64]]  # of query rows, of key rows


class MaskKind(NamedTuple):
    """Which kernels and indexes a mask takes. listed: active blocks as bits, not as diagonals; documents: packed."""

    listed: bool = False
    documents: bool = False


DIAGONALS = MaskKind()


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskWork:
    """The work of one task: tile pairs, query rows (head, tile) that have any, and the longest of these rows.

    The same of key rows, which dK and dV are summed over: a row is a head's key tile. Of columns they are not counted.
    rows: all query rows of the task, which are as many as its key rows. mask: of the layer.
    """

    tile_pairs: int
    rows_with_work: int
    longest_row: int
    key_rows_with_work: int
    longest_key_row: int
    rows: int
    mask: MaskKind = DIAGONALS


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadCounts:
    """Counts of some heads together, in the order of TaskWork's fields; of longest rows the longest of any head.

    blocks: int64 [5, W, W] for (query rank, key rank); columns: int64 [3, W].
    """

    blocks: NDArray[np.int64]
    columns: NDArray[np.int64]

    @classmethod
    def of(cls, counts: Workload, heads: slice) -> HeadCounts:
        """Sum up a workload's counts over heads."""
        of_blocks = (
            counts.active[..., heads].sum(axis=-1),
            counts.rows[..., heads].sum(axis=-1),
            counts.longest[..., heads].max(axis=-1, initial=0).astype(np.int64),
            counts.key_rows[..., heads].sum(axis=-1),
            counts.longest_key[..., heads].max(axis=-1, initial=0),
        )
        of_columns = (
            counts.columns[..., heads].sum(axis=-1),
            counts.column_rows[..., heads].sum(axis=-1),
            counts.longest_column_row[..., heads].max(axis=-1, initial=0),
        )
        return cls(blocks=np.stack(of_blocks), columns=np.stack(of_columns))


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Counts of one layer. active, rows, longest: [W, W, H] for (query rank, key rank, head); columns: [W, H].

    key_rows and longest_key are what rows and longest are, of key tiles: those that some query tile attends, and how
    many attend one of them. columns counts (query tile, column tile) pairs of the gathered columns; column_rows the
    query tiles that have any.
    """

    block_size: int
    tokens_per_rank: int
    active: NDArray[np.signedinteger]
    rows: NDArray[np.signedinteger]
    longest: NDArray[np.signedinteger]
    key_rows: NDArray[np.signedinteger]
    longest_key: NDArray[np.signedinteger]
    columns: NDArray[np.int64]
    column_rows: NDArray[np.int64]
    longest_column_row: NDArray[np.int64]
    mask: MaskKind = DIAGONALS
    _of_heads: dict[tuple[int, int], HeadCounts] = field(init=False, default_factory=dict, repr=False)

    def of_heads(self, heads: tuple[int, int]) -> HeadCounts:
        """Return the counts of query heads [heads[0], heads[1]) together, worked out once."""
        found = self._of_heads.get(heads)
        if found is None:
            found = self._of_heads[heads] = HeadCounts.of(self, slice(*heads))
        return found

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.active.shape[0]

    def block_task(self, query: int, key: int, heads: tuple[int, int]) -> TaskWork:
        """Return the work of the queries of rank `query` against the keys of rank `key`."""
        return self._task_work(self.of_heads(heads).blocks[:, query, key], heads)

    def columns_task(self, query: int, heads: tuple[int, int]) -> TaskWork:
        """Return the work of the queries of rank `query` against all gathered columns."""
        return self._task_work([*self.of_heads(heads).columns[:, query], 0, 0], heads)

    def _task_work(self, counts: Sequence[int] | NDArray[np.int64], heads: tuple[int, int]) -> TaskWork:
        tile_pairs, rows_with_work, longest_row, key_rows_with_work, longest_key_row = map(int, counts)
        return TaskWork(
            tile_pairs=tile_pairs, rows_with_work=rows_with_work, longest_row=longest_row,
            key_rows_with_work=key_rows_with_work, longest_key_row=longest_key_row, rows=self.rows_of(heads),
            mask=self.mask,
        )  # fmt: skip

    def with_heads(self, order: Sequence[int]) -> Workload:
        """Return the same work with the heads in another order."""
        by_head = ("active", "rows", "longest", "key_rows", "longest_key")
        by_head += ("columns", "column_rows", "longest_column_row")
        return replace(self, **{name: getattr(self, name)[..., list(order)] for name in by_head})

    def rows_of(self, heads: tuple[int, int]) -> int:
        """Return the query rows (head, tile) of one rank, which are as many as its key rows."""
        return -(-self.tokens_per_rank // self.block_size) * (heads[1] - heads[0])

    def pairs_per_rank(self) -> NDArray[np.int64]:
        """Return int64 [W]: tile pairs each rank computes, columns included."""
        return self.active.sum(axis=(1, 2)) + self.columns.sum(axis=1)


def workload(pattern: LayerPattern, placement: Placement) -> Workload:
    """Count the work of every (query rank, key rank, head) of one layer."""
    world, heads = placement.world_size, pattern.num_heads
    tiles = -(-placement.tokens_per_rank // pattern.block_size)
    aligned = placement.granularity_tokens % pattern.block_size == 0
    row_lengths = _aligned_row_lengths if aligned else _straddling_row_lengths
    # As narrow as will do: of hundreds of ranks these are hundreds of megabytes. Sums of them are int64.
    counts = np.zeros((5, world, world, heads), dtype=np.min_scalar_type(-tiles * tiles - 1))
    seen: dict[object, int] = {}  # heads that list no blocks of their own may be alike: they are counted once
    for number, head in enumerate(pattern.heads):
        alike = head.diagonals.tobytes() if isinstance(head, VerticalSlash) else id(head)
        first = seen.setdefault(alike, number)
        if first != number:
            counts[..., number] = counts[..., first]
            continue
        lengths, key_lengths = row_lengths(pattern, head, placement, tiles)  # [W query, T, W key], T of queries, keys
        counts[:3, ..., number] = _row_counts(lengths)
        counts[3:, ..., number] = _row_counts(key_lengths)[1:]
    columns, column_rows, longest_column_row = _row_counts(_column_row_lengths(pattern, placement, tiles))
    return Workload(
        block_size=pattern.block_size,
        tokens_per_rank=placement.tokens_per_rank,
        **dict(zip(("active", "rows", "longest", "key_rows", "longest_key"), counts, strict=True)),
        columns=columns,
        column_rows=column_rows,
        longest_column_row=longest_column_row,
        mask=MaskKind(
            listed=not all(isinstance(head, VerticalSlash) for head in pattern.heads),
            documents=pattern.documents is not None,
        ),
    )


def _row_counts(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Return the pairs, the rows that have any, and the longest row, of row lengths int64 [W, T, ...]."""
    return lengths.sum(axis=1), (lengths > 0).sum(axis=1), lengths.max(axis=1)


def unit_load(patterns: list[LayerPattern], *, granularity_tokens: int, padded_tokens: int) -> NDArray[np.float64]:
    """Return float64 [units]: tile pairs of each unit's queries, columns included, summed over layers and heads.

    A block's work is spread evenly over its tokens when units are smaller than blocks.
    """
    per_token = np.zeros(padded_tokens)
    for pattern in patterns:
        blocks = pattern.num_blocks
        load = np.zeros(blocks)
        for head in pattern.heads:
            load += keys_of_queries(pattern, head)
            load += np.searchsorted(head.columns, np.arange(1, blocks + 1) * pattern.block_size) / pattern.block_size
        spread = np.repeat(load / pattern.block_size, pattern.block_size)[: pattern.seq_len_tokens]
        per_token[: spread.size] += spread
    return per_token.reshape(-1, granularity_tokens).sum(axis=1)


def _aligned_row_lengths(pattern: LayerPattern, head: HeadPattern, placement: Placement, tiles: int) -> RowLengths:
    world = placement.world_size
    padded_blocks = placement.padded_tokens // pattern.block_size
    owner = np.repeat(placement.owner_of_units(), placement.granularity_tokens // pattern.block_size)
    blocks_of_rank = np.argsort(owner, kind="stable").reshape(world, tiles)
    if isinstance(head, VerticalSlash) and pattern.documents is None:
        counted = convolved if world <= CONVOLVED_RANKS else counted_along
        by_query, by_key = counted(head.diagonals, owner, blocks=pattern.num_blocks, world=world)
        return by_query[blocks_of_rank], by_key[blocks_of_rank].transpose(2, 1, 0)
    query, key = active_pairs(pattern, head)

    def lengths(row: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64 [W of rows, T, W of the others]."""
        found = np.bincount(row * world + owner[other], minlength=padded_blocks * world).reshape(padded_blocks, world)
        return found[blocks_of_rank]

    return lengths(query, key), lengths(key, query).transpose(2, 1, 0)


def _straddling_row_lengths(pattern: LayerPattern, head: HeadPattern, placement: Placement, tiles: int) -> RowLengths:
    # Ranks whose tiles touch the same blocks (token striping: all of them) are counted once.
    of_ranks = [_tile_blocks(pattern, placement, rank, tiles) for rank in range(placement.world_size)]
    distinct = {incidence.tobytes(): incidence for incidence in of_ranks}
    kinds, numbers = list(distinct.values()), {key: number for number, key in enumerate(distinct)}
    kind_of_rank = [numbers[incidence.tobytes()] for incidence in of_ranks]
    query, key = active_pairs(pattern, head)
    lengths, key_lengths = np.zeros((2, len(kinds), tiles, len(kinds)), dtype=np.int64)
    for q, query_tiles in enumerate(kinds):
        for k, key_tiles in enumerate(kinds):
            counted = _count_tile_pairs(query, key, query_tiles, key_tiles, pattern.num_blocks, tiles)
            lengths[q, :, k], key_lengths[q, :, k] = counted
    return lengths[kind_of_rank][:, :, kind_of_rank], key_lengths[kind_of_rank][:, :, kind_of_rank]


def _count_tile_pairs(
    query: NDArray[np.int64],
    key: NDArray[np.int64],
    query_tiles: NDArray[np.int64],
    key_tiles: NDArray[np.int64],
    blocks: int,
    tiles: int,
) -> RowLengths:
    """Return int64 [T] twice: per query tile the key tiles that share an active block pair with it, and the reverse."""
    most = max(np.bincount(touched[:, 1]).max(initial=0) for touched in (query_tiles, key_tiles))
    if most <= 1:  # a block lies in one tile at most
        query_tile, key_tile = (np.full(blocks, -1, dtype=np.int64) for _ in range(2))
        query_tile[query_tiles[:, 1]] = query_tiles[:, 0]
        key_tile[key_tiles[:, 1]] = key_tiles[:, 0]
        owned = (query_tile[query] >= 0) & (key_tile[key] >= 0)
        pairs = np.bincount(query_tile[query[owned]] * tiles + key_tile[key[owned]], minlength=tiles * tiles)
        shared = pairs.reshape(tiles, tiles) > 0
        return shared.sum(axis=1), shared.sum(axis=0)
    bits = sparse.csr_array((np.ones(query.size, dtype=np.int64), (query, key)), shape=(blocks, blocks))
    incidence = [
        sparse.csr_array((np.ones(len(touched), dtype=np.int64), tuple(touched.T)), shape=(tiles, blocks))
        for touched in (query_tiles, key_tiles)
    ]
    pairs = (incidence[0] @ bits @ incidence[1].T).tocsr()
    return np.diff(pairs.indptr).astype(np.int64), np.bincount(pairs.indices, minlength=tiles)


def _tile_blocks(pattern: LayerPattern, placement: Placement, rank: int, tiles: int) -> NDArray[np.int64]:
    """Return int64 [pairs, 2]: the distinct (tile, mask block) pairs of a rank's valid tokens."""
    positions = placement.positions(rank)
    tile = np.arange(positions.size) // pattern.block_size
    assert tile[-1] < tiles
    valid = positions < pattern.seq_len_tokens
    return np.unique(np.stack([tile[valid], positions[valid] // pattern.block_size], axis=1), axis=0)


def _column_row_lengths(pattern: LayerPattern, placement: Placement, tiles: int) -> NDArray[np.int64]:
    size, positions = pattern.block_size, placement.permutation().reshape(placement.world_size, -1)
    first = positions[:, ::size]
    last = positions[:, np.minimum(np.arange(1, tiles + 1) * size, positions.shape[1]) - 1]
    valid = first < pattern.seq_len_tokens
    reached = [np.searchsorted(head.columns[::size], last, side="right") * valid for head in pattern.heads]
    return np.stack(reached, axis=-1)
