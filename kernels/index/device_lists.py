"""Small kernels that build a Toeplitz index in place of some fifty tensor operations: launches cost more than work.

residue_kernel and rows_kernel, where the other side's blocks are an arithmetic progression: forward, a row is query
block I and visits key tiles u = (I - first - d) / stride = m - entry; transposed, it is key block J and visits query
tiles u = (J + d - first) / stride = entry - m. residue and m are the remainder and quotient of the row's distance from
the other side's first block by that side's stride; diagonals are d = residue + stride * entry.
periodic_kernel and periodic_rows_kernel, where they are periodic: see index_periodic.py.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run

_CHUNK, _ROWS = 1024, 128


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
def rows_kernel(active, row_blocks, before, fields, tiles, stride, first, others, length, blocks,
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
    high = tl.minimum(tl.maximum(high, low), length)
    valid = (rows < tiles) & (block < blocks)
    high = tl.where(valid, high, low)
    line = (head * stride + residue) * (length + 1)
    skipped = tl.load(before + line + low, mask=valid, other=0)
    count = tl.load(before + line + high, mask=valid, other=0) - skipped
    has_own = valid & (residue == 0) & (own >= 0) & (own < others)
    diagonal_active = tl.load(active + head * blocks) != 0
    pointers = fields + (head * tiles + rows) * 4
    tl.store(pointers, line + skipped, mask=rows < tiles)
    tl.store(pointers + 1, count, mask=rows < tiles)
    tl.store(pointers + 2, own, mask=rows < tiles)
    tl.store(pointers + 3, tl.where(has_own & diagonal_active, own, -1), mask=rows < tiles)


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
            here = tl.load(present + row_class * blocks + diagonal, mask=below, other=0) != 0
            on = (here & (tl.load(active + head * blocks + diagonal, mask=below, other=0) != 0)).to(tl.int32)
            up_to = carry + tl.cumsum(on, 0)
            value = tl.load(constant + row_class * blocks + diagonal, mask=below, other=0)
            tl.store(target + up_to - 1, value, mask=on != 0)
            carry += tl.sum(on, 0)
    tl.store(counts, carry)
    for start in range(0, reach, CHUNK):
        place = start + tl.arange(0, CHUNK)
        diagonal = first + place
        inside = (place < reach) & (diagonal < blocks)
        here = tl.load(present + row_class * blocks + diagonal, mask=inside, other=0) != 0
        on = (here & (tl.load(active + head * blocks + diagonal, mask=inside, other=0) != 0)).to(tl.int32)
        up_to = carry + tl.cumsum(on, 0)
        value = tl.load(constant + row_class * blocks + diagonal, mask=inside, other=0)
        tl.store(counts + 1 + place, up_to, mask=place < reach)
        tl.store(target + up_to - 1, value, mask=on != 0)
        carry += tl.sum(on, 0)


@triton.jit(do_not_specialize=["tiles", "classes", "blocks", "reach", "room"])
def periodic_rows_kernel(active, before, row_blocks, row_class, row_base, own_tiles, fields, tiles, classes, blocks,
                         reach, room, SECTIONS: tl.constexpr, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
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
    section = (diagonals - 1) // reach
    listing = head * classes + tl.load(row_class + rows, mask=inside, other=0)
    start = listing * room + section * (section + 1) // 2 * reach
    counts = before + (listing * SECTIONS + section) * (reach + 1) + diagonals - section * reach
    own = tl.load(own_tiles + rows, mask=inside, other=-1).to(tl.int32)
    diagonal_active = tl.load(active + head * blocks) != 0
    pointers = fields + (head * tiles + rows) * 4
    tl.store(pointers, start, mask=inside)
    tl.store(pointers + 1, tl.load(counts, mask=inside & valid, other=0), mask=inside)
    tl.store(pointers + 2, tl.load(row_base + rows, mask=inside, other=0), mask=inside)
    tl.store(pointers + 3, tl.where(valid & diagonal_active, own, -1), mask=inside)


def residue_lists(active: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """(entries, before) int32 [H * stride * (length + 1)] of active [H, N], length = ceil(N / stride)."""
    heads, blocks = active.shape
    length = -(-blocks // stride)
    entries, before = torch.empty(2, heads * stride * (length + 1), dtype=torch.int32, device=active.device)
    chunk = min(_CHUNK, triton.next_power_of_2(length))
    run(residue_kernel, (heads, stride), active.contiguous().view(torch.uint8), entries, before, stride, length, blocks,
        CHUNK=chunk)
    return entries, before


def row_fields(active: Tensor, row_blocks: Tensor, before: Tensor, *, stride: int, first: int, others: int,
               transposed: bool) -> Tensor:
    """int32 [H, T, 4]: see rows_kernel. row_blocks int32 [T]; first block, stride and valid tiles of the other side."""
    (heads, blocks), tiles = active.shape, row_blocks.shape[0]
    fields = torch.empty(heads, tiles, 4, dtype=torch.int32, device=active.device)
    if tiles:
        run(
            rows_kernel, (triton.cdiv(tiles, _ROWS), heads),
            active.contiguous().view(torch.uint8), row_blocks, before, fields, tiles, stride, first, others,
            -(-blocks // stride), blocks, TRANSPOSED=transposed, SIZE=_ROWS)
    return fields


def periodic_entries(active: Tensor, constant: Tensor, present: Tensor, by_shard: Tensor | None, *,
                     sections: int) -> tuple[Tensor, Tensor]:
    """(entries [H, C, room], before [H, C, sections, reach + 1]) int32 of active [H, N]: see periodic_kernel."""
    (heads, blocks), classes = active.shape, constant.shape[0]
    reach = -(-blocks // sections)
    room = sections * (sections + 1) // 2 * reach
    entries = torch.empty(heads, classes, room, dtype=torch.int32, device=active.device)
    before = torch.empty(heads, classes, sections, reach + 1, dtype=torch.int32, device=active.device)
    run(
        periodic_kernel, (heads, classes * sections),
        active.contiguous().view(torch.uint8), constant, present.view(torch.uint8), by_shard, entries, before, classes,
        blocks, reach, room, SECTIONS=sections, CHUNK=min(_CHUNK, triton.next_power_of_2(blocks)))
    return entries, before


def periodic_fields(active: Tensor, entries: Tensor, before: Tensor, row_blocks: Tensor, row_class: Tensor,
                    row_base: Tensor, own_tiles: Tensor, *, transposed: bool) -> Tensor:
    """int32 [H, T, 4]: see periodic_rows_kernel. row_blocks, row_class, row_base int32 [T], own_tiles int64 [T]."""
    (heads, blocks), tiles = active.shape, row_blocks.shape[0]
    fields = torch.empty(heads, tiles, 4, dtype=torch.int32, device=active.device)
    _, classes, sections, reach = before.shape
    run(
        periodic_rows_kernel, (triton.cdiv(tiles, _ROWS), heads),
        active.contiguous().view(torch.uint8), before, row_blocks, row_class, row_base, own_tiles, fields, tiles,
        classes, blocks, reach - 1, entries.shape[2], SECTIONS=sections, TRANSPOSED=transposed, SIZE=_ROWS)
    return fields
