"""XAttention's choice on GPUs: antidiagonal sums as one blocked matmul, and the fewest blocks without sorting.

xattention.py defines the same with tensor operations. The first kernel multiplies cells (stride tokens each) and
leaves, for each query cell, the softmax numerators summed to key blocks, relative to a peak per tile of key cells; the
second puts the tiles of a query block together and takes blocks from the highest mass down.
Shape legend: T local query tiles of block_size tokens, N key blocks, CELLS cells a block, M query cells and K key cells
of a Triton tile.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...head_dims import CHOOSING_HEAD_DIMS
from ...jit import run
from ..probe import ShardTensors

TILE_CELLS = 128
# Sums held at once (float32): bounds the memory of long sequences.
SUMS_AT_ONCE = 1 << 27


@triton.jit
def cell_sums_kernel(q, keys, blocks, sums, peaks, q_s, q_h, k_h, q_tokens, seq_len, first_tile, tiles, key_blocks,
                     key_tiles, scale, GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr,
                     K: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """sums float32 [H, tiles * CELLS, N], peaks float32 [H, tiles * CELLS, key tiles]: of local tiles from first_tile.

    Grid (key tiles, ceil(tiles * CELLS / M), H); tiles of key cells that all lie in the future write nothing.
    """
    key_tile, head = tl.program_id(0), tl.program_id(2)
    CELLS: tl.constexpr = BLOCK // STRIDE
    cells = tl.program_id(1) * M + tl.arange(0, M)
    inside = cells < tiles * CELLS
    block = tl.load(blocks + first_tile + cells // CELLS, mask=inside, other=0).to(tl.int32)
    q_cell = block * CELLS + cells % CELLS
    if key_tile * K <= tl.max(tl.where(inside, q_cell, 0), 0):
        k_cell = key_tile * K + tl.arange(0, K)
        dims = tl.arange(0, D)
        q_base = q + head.to(tl.int64) * q_h + dims[None, :]
        k_base = keys + (head // GROUP).to(tl.int64) * k_h + dims[None, :]
        acc = tl.zeros([M, K], tl.float32)
        for s in range(0, STRIDE):
            token = (first_tile * CELLS + cells) * STRIDE + (STRIDE - 1 - s)
            valid = inside & (token < q_tokens) & (q_cell * STRIDE + (STRIDE - 1 - s) < seq_len)
            a = tl.load(q_base + token.to(tl.int64)[:, None] * q_s, mask=valid[:, None], other=0.0)
            row = (k_cell * STRIDE + s).to(tl.int64)
            b = tl.load(k_base + row[:, None] * D, mask=(k_cell < key_blocks * CELLS)[:, None], other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        logits = tl.where(k_cell[None, :] <= q_cell[:, None], acc * scale, float("-inf"))
        peak = tl.max(logits, 1)
        weights = tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        by_block = tl.sum(tl.reshape(weights, [M, K // CELLS, CELLS]), 2)
        line = head.to(tl.int64) * tiles * CELLS + cells
        key_block = key_tile * (K // CELLS) + tl.arange(0, K // CELLS)
        tl.store(sums + line[:, None] * key_blocks + key_block[None, :], by_block,
                 mask=inside[:, None] & (key_block < key_blocks)[None, :])
        tl.store(peaks + line * key_tiles + key_tile, peak, mask=inside)


@triton.jit
def fewest_blocks_kernel(sums, peaks, blocks, active, first_tile, tiles, key_blocks, key_tiles, valid_cells, mass,
                         CELLS: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """active uint8 [H, tiles, N]: own and first block, then the fewest others up to `mass`. Grid (tiles, H)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(blocks + first_tile + tile).to(tl.int32)
    key_block = tl.arange(0, SIZE)
    seen = (key_block <= block) & (key_block < key_blocks)
    values = tl.zeros([SIZE], tl.float32)
    for cell in range(0, CELLS):
        line = (head.to(tl.int64) * tiles + tile) * CELLS + cell
        peak = tl.load(peaks + line * key_tiles + key_block * CELLS // K, mask=seen, other=float("-inf"))
        top = tl.max(peak, 0)
        part = tl.load(sums + line * key_blocks + key_block, mask=seen, other=0.0)
        part = tl.where(seen, part * tl.exp(peak - tl.where(top == float("-inf"), 0.0, top)), 0.0)
        total = tl.sum(part, 0)
        counted = (block * CELLS + cell < valid_cells) & (total > 0.0)
        values += tl.where(counted, part / tl.where(total > 0.0, total, 1.0), 0.0)
    forced = (seen & (key_block == block)) | (key_block == 0)
    exact = values.to(tl.float64)
    wanted = mass * tl.sum(exact, 0)
    reached = tl.sum(tl.where(forced, exact, 0.0), 0)
    # Of values that are not negative, the bits rise with the value: find the highest cut that reaches the mass.
    others = seen & (forced == 0)
    bits = tl.where(others, values.to(tl.int32, bitcast=True), -1)
    cut = 0
    for step in range(0, 31):
        trial = cut | (1 << (30 - step))
        enough = reached + tl.sum(tl.where(bits >= trial, exact, 0.0), 0) >= wanted
        cut = tl.where(enough, trial, cut)
    above = bits > cut
    tied = (bits == cut) & (values > 0.0)
    missing = wanted - reached - tl.sum(tl.where(above, exact, 0.0), 0)
    value = tl.max(tl.where(tied, exact, 0.0), 0)
    ties = tl.ceil(missing / tl.where(value > 0.0, value, 1.0))
    taken = forced | above | (tied & (tl.cumsum(tied.to(tl.int32), 0).to(tl.float64) <= ties))
    line = (head.to(tl.int64) * tiles + tile) * key_blocks
    tl.store(active + line + key_block, taken.to(tl.uint8), mask=key_block < key_blocks)


def applies(shard: ShardTensors, stride: int) -> bool:
    """Whether these kernels cover the shard: the same on every rank."""
    cells = shard.block_size // stride
    small = shard.block_size <= TILE_CELLS and cells & (cells - 1) == 0 and stride & (stride - 1) == 0
    return small and shard.k.shape[3] in CHOOSING_HEAD_DIMS and shard.q.element_size() <= 4


def active_rows(
    shard: ShardTensors, blocks: Tensor, keys: Tensor, *, scale: float, stride: int, mass: float
) -> Iterator[Tensor]:
    """Uint8 [H, t, N] of some local query tiles after the other: their active key blocks.

    blocks int64 [T]: global blocks of the local tiles; keys [H_kv, N * block_size, D]: those of the whole sequence.
    """
    heads, dim = shard.q.shape[2:]
    kv_heads, cells, key_blocks = keys.shape[0], shard.block_size // stride, shard.blocks
    q = shard.q[0] if shard.q.stride(-1) == 1 else shard.q[0].contiguous()
    keys, key_tiles = keys.contiguous(), triton.cdiv(key_blocks * cells, TILE_CELLS)
    at_once = max(1, SUMS_AT_ONCE // (heads * cells * key_blocks))
    for first in range(0, blocks.shape[0], at_once):
        tiles = min(at_once, blocks.shape[0] - first)
        sums = torch.empty(heads, tiles * cells, key_blocks, dtype=torch.float32, device=q.device)
        peaks = torch.empty(heads, tiles * cells, key_tiles, dtype=torch.float32, device=q.device)
        common = {"blocks": blocks, "sums": sums, "peaks": peaks, "first_tile": first, "tiles": tiles,
                  "key_blocks": key_blocks, "key_tiles": key_tiles, "K": TILE_CELLS}
        run(cell_sums_kernel, (key_tiles, triton.cdiv(tiles * cells, TILE_CELLS), heads), q=q, keys=keys,
            q_s=q.stride(0), q_h=q.stride(1), k_h=keys.stride(0), q_tokens=q.shape[0], seq_len=shard.seq_len_tokens,
            scale=scale / stride, GROUP=heads // kv_heads, BLOCK=shard.block_size, STRIDE=stride, M=TILE_CELLS, D=dim,
            PRECISION="ieee" if q.element_size() > 2 else "tf32", num_warps=8, num_stages=3, **common)
        active = torch.empty(heads, tiles, key_blocks, dtype=torch.uint8, device=q.device)
        size = triton.next_power_of_2(key_blocks)
        run(fewest_blocks_kernel, (tiles, heads), active=active, valid_cells=-(-shard.seq_len_tokens // stride),
            mass=mass, CELLS=cells, SIZE=size, num_warps=8 if size > 1024 else 4, **common)
        yield active
