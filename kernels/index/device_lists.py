"""Small kernels that build an index in place of some fifty tensor operations: launches cost more than work.

residue_kernel and rows_kernel, where the other side's blocks are an arithmetic progression: forward, a row is query
block I and visits key tiles u = (I - first - d) / stride = m - entry; transposed, it is key block J and visits query
tiles u = (J + d - first) / stride = entry - m. residue and m are the remainder and quotient of the row's distance from
the other side's first block by that side's stride; diagonals are d = residue + stride * entry.
periodic_kernel and periodic_rows_kernel, where they are periodic: see periodic.py.
Where documents are packed, `reach` int32 [N] says how many diagonals a row of each block has inside its documents.
count_kernel and fill_kernel, for block masks and irregular placements: one list of visited tiles per row, counted, then
written. Rows read their line of the mask once per pass, so that nothing of the size rows times tiles is ever stored.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run
from ..mask import AttentionMask, document_reach
from .periodic import PeriodicTables

_CHUNK, _ROWS = 1024, 128
# Above this many entries that there could be (512 MB), they are counted on the host first: one synchronisation.
UNCOUNTED_LIMIT = 1 << 27


@triton.jit
def store_fields(fields, line, inside, start, count, base, own):
    """The four fields of rows, of which `line` is the place in [H, T]."""
    tl.store(fields + line * 4, start, mask=inside)
    tl.store(fields + line * 4 + 1, count, mask=inside)
    tl.store(fields + line * 4 + 2, base, mask=inside)
    tl.store(fields + line * 4 + 3, own, mask=inside)


@triton.jit
def append_constants(active, constant, present, head, row_class, blocks, diagonal, inside, target, carry):
    """How many of these diagonals and all `carry` before are active and here; writes their constants to target."""
    here = tl.load(present + row_class * blocks + diagonal, mask=inside, other=0) != 0
    on = (here & (tl.load(active + head * blocks + diagonal, mask=inside, other=0) != 0)).to(tl.int32)
    up_to = carry + tl.cumsum(on, 0)
    value = tl.load(constant + row_class * blocks + diagonal, mask=inside, other=0)
    tl.store(target + up_to - 1, value, mask=on != 0)
    return up_to, carry + tl.sum(on, 0)


@triton.jit(do_not_specialize=["stride", "length", "blocks"])
def residue_kernel(active, entries, before, stride, length, blocks, CHUNK: tl.constexpr):
    """Sorted entries of each (head, residue), and how many of them lie below each e = 0 .. length. Grid (H, stride).

    Diagonal 0 is left out: it is the rows' own `diagonal`. Lists are length + 1 apart.
    """
    head, residue = tl.program_id(0), tl.program_id(1)
    line = (head * stride + residue) * (length + 1)
    tl.store(before + line, 0)
    carry = 0
    for start in range(0, length, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        diagonal = residue + entry * stride
        inside = (diagonal > 0) & (diagonal < blocks)
        on = (tl.load(active + head * blocks + diagonal, mask=inside, other=0) != 0).to(tl.int32)
        up_to = carry + tl.cumsum(on, 0)
        tl.store(before + line + 1 + entry, up_to, mask=entry < length)
        tl.store(entries + line + up_to - 1, entry, mask=on != 0)
        carry += tl.sum(on, 0)


@triton.jit(do_not_specialize=["tiles", "stride", "first", "others", "length", "blocks"])
def rows_kernel(active, row_blocks, before, reach_of, fields, tiles, stride, first, others, length, blocks,
                TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    """fields int32 [H, T, 4] (start, count, base, diagonal) of every row. Grid (T / SIZE, H). others: valid tiles."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    block = tl.load(row_blocks + rows, mask=rows < tiles, other=0)
    if TRANSPOSED:
        distance = first - block
    else:
        distance = block - first
    # Division rounds towards zero; a negative distance must round down.
    m = tl.where(distance >= 0, distance // stride, -((stride - 1 - distance) // stride))
    residue = distance - m * stride
    if TRANSPOSED:
        low, high, own = m, m + others, -m
    else:
        low, high, own = m - others + 1, m + 1, m
    low = tl.minimum(tl.maximum(low, 0), length)
    valid = (rows < tiles) & (block < blocks)
    if reach_of is not None:
        reach = tl.load(reach_of + block, mask=valid, other=0)
        high = tl.minimum(high, (reach - residue + stride) // stride)
    high = tl.minimum(tl.maximum(high, low), length)
    high = tl.where(valid, high, low)
    line = (head * stride + residue) * (length + 1)
    skipped = tl.load(before + line + low, mask=valid, other=0)
    count = tl.load(before + line + high, mask=valid, other=0) - skipped
    has_own = valid & (residue == 0) & (own >= 0) & (own < others)
    diagonal_active = tl.load(active + head * blocks) != 0
    at_own = tl.where(has_own & diagonal_active, own, -1)
    store_fields(fields, head * tiles + rows, rows < tiles, line + skipped, count, own, at_own)


@triton.jit(do_not_specialize=["classes", "blocks", "reach", "room"])
def periodic_kernel(active, constant, present, by_shard, entries, before, classes, blocks, reach, room,
                    SECTIONS: tl.constexpr, CHUNK: tl.constexpr):
    """Constants of the active diagonals of each (head, class, section), and how many come before each of the section's.

    Grid (H, C * SECTIONS). constant int32 [C, N], present, by_shard [C, N]: see PeriodicTables. Section s is of rows
    with diagonals up to s * reach .. (s + 1) * reach - 1: its list has all below s * reach, by shard, then these.
    entries [H, C, room], section s from s (s + 1) / 2 * reach on; before [H, C, SECTIONS, reach + 1].
    """
    head, row_class, section = tl.program_id(0), tl.program_id(1) // SECTIONS, tl.program_id(1) % SECTIONS
    listing = head * classes + row_class
    target = entries + listing.to(tl.int64) * room + section * (section + 1) // 2 * reach
    counts = before + (listing * SECTIONS + section) * (reach + 1)
    first = section * reach
    carry = 0
    if SECTIONS > 1:
        for start in range(0, tl.where(section > 0, blocks, 0), CHUNK):
            place = start + tl.arange(0, CHUNK)
            diagonal = tl.load(by_shard + row_class * blocks + place, mask=place < blocks, other=blocks)
            below = (place < blocks) & (diagonal < first)
            _, carry = append_constants(active, constant, present, head, row_class, blocks, diagonal, below, target,
                                        carry)
    tl.store(counts, carry)
    for start in range(0, reach, CHUNK):
        place = start + tl.arange(0, CHUNK)
        diagonal = first + place
        inside = (place < reach) & (diagonal < blocks)
        up_to, carry = append_constants(active, constant, present, head, row_class, blocks, diagonal, inside, target,
                                        carry)
        tl.store(counts + 1 + place, up_to, mask=place < reach)


@triton.jit(do_not_specialize=["tiles", "classes", "blocks", "reach", "room"])
def periodic_rows_kernel(active, before, row_blocks, row_class, row_base, own_tiles, reach_of, fields, tiles, classes,
                         blocks, reach, room, SECTIONS: tl.constexpr, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    """fields int32 [H, T, 4] (start, count, base, diagonal) of every row. Grid (T / SIZE, H). See periodic_kernel."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = rows < tiles
    block = tl.load(row_blocks + rows, mask=inside, other=blocks)
    valid = block < blocks
    if TRANSPOSED:
        diagonals = blocks - block
    else:
        diagonals = block + 1
    diagonals = tl.where(valid, diagonals, 1)  # so many stay in the sequence
    if reach_of is not None:
        diagonals = tl.minimum(diagonals, tl.load(reach_of + block, mask=valid, other=0) + 1)
    section = (diagonals - 1) // reach
    listing = head * classes + tl.load(row_class + rows, mask=inside, other=0)
    start = listing * room + section * (section + 1) // 2 * reach
    counts = before + (listing * SECTIONS + section) * (reach + 1) + diagonals - section * reach
    own = tl.load(own_tiles + rows, mask=inside, other=-1).to(tl.int32)
    diagonal_active = tl.load(active + head * blocks) != 0
    count = tl.load(counts, mask=inside & valid, other=0)
    base = tl.load(row_base + rows, mask=inside, other=0)
    store_fields(fields, head * tiles + rows, inside, start, count, base, tl.where(valid & diagonal_active, own, -1))


def residue_lists(active: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """(entries, before) int32 [H * stride * (length + 1)] of active [H, N], length = ceil(N / stride)."""
    heads, blocks = active.shape
    length = -(-blocks // stride)
    entries, before = torch.empty(2, heads * stride * (length + 1), dtype=torch.int32, device=active.device)
    chunk = min(_CHUNK, triton.next_power_of_2(length))
    run(residue_kernel, (heads, stride), active.contiguous().view(torch.uint8), entries, before, stride, length, blocks,
        CHUNK=chunk)
    return entries, before


def row_fields(active: Tensor, row_blocks: Tensor, before: Tensor, reach: Tensor | None, *, stride: int, first: int,
               others: int, transposed: bool) -> Tensor:
    """int32 [H, T, 4]: see rows_kernel. row_blocks int32 [T]; first block, stride and valid tiles of the other side."""
    (heads, blocks), tiles = active.shape, row_blocks.shape[0]
    fields = torch.empty(heads, tiles, 4, dtype=torch.int32, device=active.device)
    if tiles:
        run(
            rows_kernel, (triton.cdiv(tiles, _ROWS), heads),
            active.contiguous().view(torch.uint8), row_blocks, before, reach, fields, tiles, stride, first, others,
            -(-blocks // stride), blocks, TRANSPOSED=transposed, SIZE=_ROWS)
    return fields


def periodic_lists(active: Tensor, tables: PeriodicTables, row_blocks: Tensor, own_tiles: Tensor,
                   reach_of: Tensor | None, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """(rows [H, T, 4], entries) of block.TileLists for active [H, N], to be added to the base. Does not wait.

    row_blocks int32 [T]: the rows' mask blocks; own_tiles int64 [T]: the other side's tile of each, or -1. See
    periodic_kernel and periodic_rows_kernel.
    """
    (heads, blocks), tiles, classes = active.shape, row_blocks.shape[0], tables.constant.shape[0]
    sections, flags = tables.sections, active.contiguous().view(torch.uint8)
    reach = -(-blocks // sections)
    room = sections * (sections + 1) // 2 * reach
    entries = active.new_empty((heads, classes, room), dtype=torch.int32)
    before = active.new_empty((heads, classes, sections, reach + 1), dtype=torch.int32)
    fields = active.new_empty((heads, tiles, 4), dtype=torch.int32)
    run(
        periodic_kernel, (heads, classes * sections),
        flags, tables.constant, tables.present.view(torch.uint8), tables.by_shard, entries, before, classes, blocks,
        reach, room, SECTIONS=sections, CHUNK=min(_CHUNK, triton.next_power_of_2(blocks)))
    run(
        periodic_rows_kernel, (triton.cdiv(tiles, _ROWS), heads),
        flags, before, row_blocks, tables.row_class, tables.base, own_tiles, reach_of, fields, tiles, classes, blocks,
        reach, room, SECTIONS=sections, TRANSPOSED=transposed, SIZE=_ROWS)
    return fields, entries.view(-1)


@triton.jit
def visited(active, other_blocks, reach_of, head, block, tile, others, blocks, TOEPLITZ: tl.constexpr,
            TRANSPOSED: tl.constexpr):
    """Which of these tiles of the other side a row of this block visits, its own block excepted: int32."""
    reach = blocks
    if reach_of is not None:
        reach = tl.load(reach_of + block, mask=block < blocks, other=0)
    other = tl.load(other_blocks + tile, mask=tile < others, other=-1)
    if TRANSPOSED:
        causal = (other > block) & (other < blocks)
    else:
        causal = (other >= 0) & (other < tl.where(block < blocks, block, 0))
    causal &= tl.abs(block - other) <= reach
    if TOEPLITZ:
        offset = head * blocks + tl.abs(block - other)
    else:
        offset = (head.to(tl.int64) * blocks + block) * blocks + other
    return (tl.load(active + offset, mask=causal, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["tiles", "others", "blocks"])
def count_kernel(active, row_blocks, other_blocks, reach_of, own_tiles, fields, counts, work, tiles, others, blocks,
                 TOEPLITZ: tl.constexpr, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    """counts int32 [H, T] of visited tiles, the rows' fields but for their start, work int32 [T] of all heads, from 0.

    active: rows of the mask with the other side along them, [H, N, N], or diagonals [H, N]. Grid (T, H).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(row_blocks + row)
    line = head * tiles + row
    found = 0
    for first in range(0, others, SIZE):
        tile = first + tl.arange(0, SIZE)
        found += tl.sum(visited(active, other_blocks, reach_of, head, block, tile, others, blocks, TOEPLITZ,
                                TRANSPOSED), 0)
    tl.store(counts + line, found)
    own = tl.load(own_tiles + row).to(tl.int32)
    here = (own >= 0) & (block < blocks)
    if TOEPLITZ:
        offset = (head * blocks).to(tl.int64)
    else:
        offset = (head.to(tl.int64) * blocks + block) * blocks + block
    own = tl.where(tl.load(active + offset, mask=here, other=0) != 0, own, -1)
    store_fields(fields, line, line >= 0, 0, found, 0, own)
    tl.atomic_add(work + row, found + (own >= 0).to(tl.int32))  # integers: in any order the same


@triton.jit(do_not_specialize=["tiles", "others", "blocks"])
def fill_kernel(active, row_blocks, other_blocks, reach_of, ends, fields, entries, tiles, others, blocks,
                TOEPLITZ: tl.constexpr, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    """Entries, and each row's start in its fields; ends int64 [H, T]: counts added up. Grid (T, H)."""
    row, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(row_blocks + row)
    line = head * tiles + row
    found = 0
    start = tl.load(ends + line) - tl.load(fields + line * 4 + 1)
    for first in range(0, others, SIZE):
        tile = first + tl.arange(0, SIZE)
        on = visited(active, other_blocks, reach_of, head, block, tile, others, blocks, TOEPLITZ, TRANSPOSED)
        tl.store(entries + start + found + tl.cumsum(on, 0) - 1, tile, mask=on != 0)
        found += tl.sum(on, 0)
    tl.store(fields + line * 4, start.to(tl.int32))


def csr_lists(
    mask: AttentionMask, rows: tuple[np.ndarray, Tensor], others: tuple[np.ndarray, Tensor], own_tiles: Tensor, *,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows int32 [H, T, 4], entries int32 [E]) of block.TileLists, tiles of a row rising, and work int32 [T].

    rows, others: the blocks of both sides' tiles, on the host and on the device (int32). own_tiles int64 [T]: the other
    side's tile of each row's block, or -1. transposed: rows are keys. work: tiles that all heads of a row visit.
    """
    row_blocks, other_blocks = rows[1], others[1]
    tiles, heads, device = row_blocks.shape[0], mask.heads, row_blocks.device
    active = mask.active if mask.is_toeplitz or not transposed else mask.active.transpose(1, 2)
    room = heads * _causal_pairs(rows[0], others[0], mask.blocks, transposed=transposed)
    fields = torch.empty(heads, tiles, 4, dtype=torch.int32, device=device)
    work = torch.zeros(tiles, dtype=torch.int32, device=device)
    if not tiles:
        return fields, torch.empty(0, dtype=torch.int32, device=device), work
    counts = torch.empty(heads, tiles, dtype=torch.int32, device=device)
    given = {
        "active": active.contiguous().view(torch.uint8), "row_blocks": row_blocks, "other_blocks": other_blocks,
        "reach_of": document_reach(mask, transposed=transposed),
        "tiles": tiles, "others": other_blocks.shape[0], "blocks": mask.blocks, "TOEPLITZ": mask.is_toeplitz,
        "TRANSPOSED": transposed, "SIZE": min(_CHUNK, triton.next_power_of_2(max(other_blocks.shape[0], 1))),
    }
    run(count_kernel, (tiles, heads), own_tiles=own_tiles, fields=fields, counts=counts, work=work, **given)
    if not room:
        return fields, torch.empty(0, dtype=torch.int32, device=device), work
    ends = counts.view(-1).cumsum(0)
    if room > UNCOUNTED_LIMIT:
        room = int(ends[-1])
    entries = torch.empty(room, dtype=torch.int32, device=device)
    run(fill_kernel, (tiles, heads), ends=ends, fields=fields, entries=entries, **given)
    return fields, entries, work


def _causal_pairs(rows: np.ndarray, others: np.ndarray, blocks: int, *, transposed: bool) -> int:
    """How many (row, tile) pairs of valid blocks are strictly causal."""
    rows, others = rows[rows < blocks], np.sort(others[others < blocks])
    before = np.searchsorted(others, rows, side="right" if transposed else "left")
    return int((len(others) - before).sum() if transposed else before.sum())
