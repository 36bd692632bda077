"""Which tiles each row visits as flash-attn-4 wants it: a padded table of tile numbers per head, written on the GPU.

A *row* is a local query tile or, transposed, a local key tile (see index.py). Its *full* tiles need no element mask;
its *partial* ones do: the row's own block (causality, the ragged tail) and, with documents, tiles where several meet.
Query heads may be laid end to end (see fold.py): a row's table then has the tiles of all of them, numbered on.
A table holds four bytes for each (head, row, tile of the other side): 64 MiB at 128K tokens and 16 heads, where one
launch takes all heads and the tables are kept. What is larger is dropped after its launch, and what is larger still is
built and launched by groups of heads.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..index.block import BlockTask, Side, block_task
from ..jit import run
from ..mask import AttentionMask

TABLE_BYTES = 72 << 20  # of tables that are kept until backward: 128K tokens with 16 heads fit
LAUNCH_TABLE_BYTES = 160 << 20  # of the tables of one launch; a head's alone may be larger
_CHUNK = 1024


@triton.jit(do_not_specialize=["rows", "others", "full_capacity", "partial_capacity", "blocks"])
def tiles_kernel(active, row_blocks, other_blocks, row_documents, other_documents, full_counts, full_tiles,
                 partial_counts, partial_tiles, rows, others, full_capacity, partial_capacity, blocks,
                 FOLD: tl.constexpr, TRANSPOSED: tl.constexpr, TOEPLITZ: tl.constexpr, DOCUMENTS: tl.constexpr,
                 CHUNK: tl.constexpr):
    """Ascending full and partial tiles of each (FOLD heads, row), and how many. Grid (rows, H / FOLD).

    row_documents, other_documents int32 [2, T]: the lowest and the highest document of each tile.
    """
    row, fold = tl.program_id(0), tl.program_id(1)
    block = tl.load(row_blocks + row)
    line = fold.to(tl.int64) * rows + row
    full, partial = 0, 0
    if DOCUMENTS:
        low, high = tl.load(row_documents + row), tl.load(row_documents + rows + row)
    chunks = tl.cdiv(others, CHUNK)
    for step in range(0, FOLD * chunks):
        member = step // chunks
        head = fold * FOLD + member
        tile = (step % chunks) * CHUNK + tl.arange(0, CHUNK)
        other = tl.load(other_blocks + tile, mask=tile < others, other=blocks)
        if TRANSPOSED:
            query, key = other, tl.zeros_like(other) + block
        else:
            query, key = tl.zeros_like(other) + block, other
        causal = (key <= query) & (query < blocks)
        if TOEPLITZ:
            offset = head * blocks + query - key
        else:
            offset = (head.to(tl.int64) * blocks + query) * blocks + key
        on = tl.load(active + offset, mask=causal, other=0) != 0
        masked = query == key
        if DOCUMENTS:
            other_low = tl.load(other_documents + tile, mask=tile < others, other=0)
            other_high = tl.load(other_documents + others + tile, mask=tile < others, other=0)
            on = on & (other_low <= high) & (low <= other_high)
            masked = masked | (low != high) | (other_low != other_high)
        taken = (on & (masked == 0)).to(tl.int32)
        slot = full + tl.cumsum(taken, 0) - 1
        tl.store(full_tiles + line * full_capacity + slot, member * others + tile, mask=taken != 0)
        full += tl.sum(taken, 0)
        taken = (on & masked).to(tl.int32)
        slot = partial + tl.cumsum(taken, 0) - 1
        tl.store(partial_tiles + line * partial_capacity + slot, member * others + tile, mask=taken != 0)
        partial += tl.sum(taken, 0)
    tl.store(full_counts + line, full)
    tl.store(partial_counts + line, partial)


class TileTables(NamedTuple):
    """The rows of some heads, G lists of them: counts int32 [1, G, T], tiles int32 [1, G, T, capacity]."""

    full_counts: Tensor
    full_tiles: Tensor
    partial_counts: Tensor
    partial_tiles: Tensor

    def rows_as_batch(self) -> TileTables:
        """Views of the same with the rows as a batch of one-row sequences: [T, G, 1] and [T, G, 1, capacity]."""
        _, heads, rows = self.full_counts.shape
        full_counts, partial_counts = (x.as_strided((rows, heads, 1), (1, rows, 1)) for x in self[::2])
        full_tiles, partial_tiles = (x.permute(2, 1, 0, 3) for x in self[1::2])
        return TileTables(full_counts, full_tiles, partial_counts, partial_tiles)

    @property
    def nbytes(self) -> int:
        """Device memory held."""
        return sum(table.nbytes for table in self)


@dataclass(frozen=True, kw_only=True)
class TileDocuments:
    """Documents of one shard: int32 [T * block_size] of its tokens (padded), their positions, and [2, T] bounds."""

    tokens: Tensor
    positions: Tensor
    bounds: Tensor


@dataclass(frozen=True, kw_only=True)
class Flash4Task:
    """The index of one (query shard, key shard) task, on the mask's device."""

    task: BlockTask
    q_documents: TileDocuments | None
    k_documents: TileDocuments | None
    _kept: dict[tuple[bool, int], TileTables] = field(default_factory=dict)

    @cached_property
    def q_tiles(self) -> int:
        """Query tiles with valid tokens."""
        return -(-self.task.q_valid_tokens // self.task.mask.block_size)

    @cached_property
    def k_tiles(self) -> int:
        """Key tiles with valid tokens."""
        return -(-self.task.k_valid_tokens // self.task.mask.block_size)

    def table_bytes_of_a_head(self, *, transposed: bool) -> int:
        """Bytes of one head's tables."""
        rows, others = (self.k_tiles, self.q_tiles) if transposed else (self.q_tiles, self.k_tiles)
        return 4 * rows * (others + self._partial_capacity(others) + 2)

    def tables(self, first: int, last: int, *, transposed: bool, fold: int = 1) -> TileTables:
        """The tables of heads first .. last - 1; rows are query (or, transposed, key) tiles. Kept if of all heads.

        fold: how many query heads are end to end, where transposed.
        """
        key = transposed, fold
        if key in self._kept:
            return self._kept[key]
        mask, lists = self.task.mask, (last - first) // fold
        sides = [(self.task.q_side, self.q_documents, self.q_tiles), (self.task.k_side, self.k_documents, self.k_tiles)]
        (side, documents, rows), (other_side, other_documents, others) = reversed(sides) if transposed else sides
        device = mask.active.device
        counts = torch.empty(2, 1, lists, rows, dtype=torch.int32, device=device)
        capacities = fold * others, fold * self._partial_capacity(others)
        full_tiles, partial_tiles = (
            torch.empty(1, lists, rows, capacity, dtype=torch.int32, device=device) for capacity in capacities
        )
        run(
            tiles_kernel, (rows, lists),
            mask.active[first:last].contiguous().view(torch.uint8), side.device_blocks, other_side.device_blocks,
            documents.bounds if documents else None, other_documents.bounds if other_documents else None,
            counts[0], full_tiles, counts[1], partial_tiles, rows, others, *capacities, mask.blocks,
            FOLD=fold, TRANSPOSED=transposed, TOEPLITZ=mask.is_toeplitz, DOCUMENTS=documents is not None,
            CHUNK=min(_CHUNK, triton.next_power_of_2(others)))
        tables = TileTables(counts[0], full_tiles, counts[1], partial_tiles)
        if last - first == self.task.mask.heads and tables.nbytes <= TABLE_BYTES:
            self._kept[key] = tables
        return tables

    def build_tables(self) -> int:
        """Build the tables of both directions now; the bytes that they take at once."""
        total = 0
        for transposed in (False, True):
            groups = head_groups(self.task.mask.heads, 1, self.table_bytes_of_a_head(transposed=transposed))
            total += max(self.tables(*group, transposed=transposed).nbytes for group in groups)
        return total

    @property
    def nbytes(self) -> int:
        """Device memory held by tables that are kept."""
        return sum(tables.nbytes for tables in self._kept.values())

    def _partial_capacity(self, others: int) -> int:
        return others if self.q_documents is not None else 1


def flash4_task(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Flash4Task:
    """The index of one task from the global positions of its tokens, [S_q] and [S_k].

    Raises ValueError when the local tiles are not whole mask blocks.
    """
    task = block_task(mask, q_positions, k_positions)
    q_documents = _tile_documents(task.q_side, task.q_documents, task.q_valid_tokens, mask)
    k_documents = _tile_documents(task.k_side, task.k_documents, task.k_valid_tokens, mask)
    return Flash4Task(task=task, q_documents=q_documents, k_documents=k_documents)


def head_groups(heads: int, group: int, bytes_of_a_head: int) -> list[tuple[int, int]]:
    """(first, last) of consecutive heads whose tables stay within LAUNCH_TABLE_BYTES, at least one head each.

    group: query heads of one KV head. A group of heads is whole KV groups, or an equal share of one.
    """
    size = max(1, min(heads, LAUNCH_TABLE_BYTES // max(bytes_of_a_head, 1)))
    size = size - size % group if size >= group else max(n for n in range(1, size + 1) if group % n == 0)
    return [(first, min(first + size, heads)) for first in range(0, heads, size)]


def _tile_documents(
    side: Side, documents: Tensor | None, valid_tokens: int, mask: AttentionMask
) -> TileDocuments | None:
    if documents is None:
        return None
    block_size, tiles = mask.block_size, -(-valid_tokens // mask.block_size)
    device = documents.device
    local = torch.arange(tiles * block_size, device=device)
    tokens = documents[local.clamp(max=max(valid_tokens - 1, 0))] if tiles else documents[:0]
    in_tiles = tokens.view(tiles, block_size)
    bounds = torch.stack(torch.aminmax(in_tiles, dim=1)) if tiles else tokens.new_empty(2, 0)
    first = side.device_blocks[:tiles].to(torch.int32) * block_size
    positions = (first[:, None] + torch.arange(block_size, dtype=torch.int32, device=device)).flatten()
    return TileDocuments(tokens=tokens.contiguous(), positions=positions, bounds=bounds)
