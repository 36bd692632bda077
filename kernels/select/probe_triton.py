"""The probe's attention, summed by column and by distance: two passes over the keys.

probe.py defines these sums with tensor operations and works for everything; this is the fast way for GPUs. The first
pass keeps a peak and a total per probe row, which ranks may combine; the second recomputes the probabilities, adds them
up over the rows and leaves those of some heads for a kernel that reads them along distances. A distance gets at most
two additions (of neighbouring tiles), so that their order does not matter: results repeat bit for bit.
Shape legend: R probe rows (a power of two), T keys of a tile, at consecutive positions.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head_dims import CHOOSING_HEAD_DIMS
from ..jit import run
from .probe import Collectives, ShardTensors

TILE_KEYS = 128
TILES_A_PROGRAM = 8
# Probabilities held at once (float32): bounds the memory of long sequences.
WEIGHTS_AT_ONCE = 1 << 27


@triton.jit
def probe_logits(rows_tile, k, positions, kv_head, tile, k_s, k_h, tokens, seq_len, first_row, scale,
                 R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """(logits [R, T], -inf where not causal or padding; the tile's first position)."""
    keys = tile * T + tl.arange(0, T)
    dims = tl.arange(0, D)
    pointers = k + kv_head.to(tl.int64) * k_h + keys.to(tl.int64)[:, None] * k_s + dims[None, :]
    k_tile = tl.load(pointers, mask=(keys < tokens)[:, None], other=0.0)
    start = tl.load(positions + tile * T).to(tl.int32)
    at = start + tl.arange(0, T)
    logits = tl.dot(rows_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    seen = at[None, :] <= (first_row + tl.arange(0, R))[:, None]
    seen = seen & ((keys < tokens) & (at < seq_len))[None, :]
    return tl.where(seen, logits, float("-inf")), start


@triton.jit
def load_rows(rows, head, count, R: tl.constexpr, D: tl.constexpr):
    """The head's probe rows [R, D], zero from `count` on."""
    row = tl.arange(0, R)
    pointers = rows + (head * count + row)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=(row < count)[:, None], other=0.0)


@triton.jit
def peaks_kernel(rows, k, positions, peaks, totals, k_s, k_h, tokens, tiles, chunks, seq_len, first_row, count, scale,
                 GROUP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
                 PRECISION: tl.constexpr):
    """peaks, totals float32 [H, chunks, R]: of each row's logits over a chunk of key tiles. Grid (H * chunks)."""
    program = tl.program_id(0)
    head = (program // (GROUP * chunks)) * GROUP + program % GROUP
    chunk = program // GROUP % chunks
    rows_tile = load_rows(rows, head, count, R, D)
    peak = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    for tile in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tiles)):
        logits, _ = probe_logits(rows_tile, k, positions, head // GROUP, tile, k_s, k_h, tokens, seq_len, first_row,
                                 scale, R, T, D, PRECISION)
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        peak = higher
    at = (head * chunks + chunk) * R + tl.arange(0, R)
    tl.store(peaks + at, peak)
    tl.store(totals + at, total)


@triton.jit
def columns_kernel(rows, k, positions, peaks, totals, columns, weights, k_s, k_h, tokens, tiles, chunks, seq_len,
                   first_row, count, scale, first_head, GROUP: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
                   D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """columns float32 [H, seq_len], zeroed: probabilities summed by key; weights [heads here, R, tiles * T]: each one.

    Grid as peaks_kernel, over the heads from first_head on.
    """
    program = tl.program_id(0)
    here = (program // (GROUP * chunks)) * GROUP + program % GROUP
    head = first_head + here
    chunk = program // GROUP % chunks
    rows_tile = load_rows(rows, head, count, R, D)
    row = tl.arange(0, R)
    known = row < count
    peak = tl.load(peaks + head * count + row, mask=known, other=0.0)
    weight = tl.where(known, 1.0 / tl.load(totals + head * count + row, mask=known, other=1.0), 0.0)
    keys = tl.arange(0, T)
    for tile in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tiles)):
        logits, start = probe_logits(rows_tile, k, positions, head // GROUP, tile, k_s, k_h, tokens, seq_len,
                                     first_row, scale, R, T, D, PRECISION)
        p = tl.exp(logits - peak[:, None]) * weight[:, None]
        line = (here * R + row).to(tl.int64) * tiles * T
        tl.store(weights + line[:, None] + (tile * T + keys)[None, :], p)
        held = (tile * T + keys < tokens) & (start + keys < seq_len)
        tl.store(columns + head.to(tl.int64) * seq_len + start + keys, tl.sum(p, 0), mask=held)


@triton.jit
def slashes_kernel(weights, positions, slashes, tiles, seq_len, first_row, first_head, R: tl.constexpr,
                   T: tl.constexpr):
    """slashes float32 [H, seq_len], zeroed: the same summed by distance. Grid (tiles, heads here).

    Row r meets the key t of a tile at distance first_row + r - start - t: slot r + T - 1 - t of 2 T.
    """
    tile, here = tl.program_id(0), tl.program_id(1)
    slots = tl.arange(0, 2 * T)
    total = tl.zeros([2 * T], tl.float32)
    source = weights + here.to(tl.int64) * R * tiles * T + tile * T
    for row in range(0, R):
        key = row + (T - 1) - slots
        total += tl.load(source + key, mask=(key >= 0) & (key < T), other=0.0)
        source += tiles * T
    distance = first_row - tl.load(positions + tile * T).to(tl.int32) - (T - 1) + slots
    valid = (total > 0.0) & (distance >= 0) & (distance < seq_len)
    line = (first_head + here).to(tl.int64) * seq_len
    tl.atomic_add(slashes + line + distance, total, mask=valid, sem="relaxed")


def tile_keys(shard: ShardTensors, count: int) -> int:
    """Keys of a tile for this shard and so many probe rows, or 0 where these kernels do not apply."""
    tokens, width = shard.k.shape[1], shard.granularity_tokens
    if shard.k.shape[3] not in CHOOSING_HEAD_DIMS or shard.q.element_size() > 4:
        return 0
    if not tokens or shard.documents is not None:
        return 0
    fits = [t for t in (TILE_KEYS, TILE_KEYS // 2) if _row_capacity(count) <= t and (width >= tokens or not width % t)]
    return fits[0] if fits else 0


def _row_capacity(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


@torch.no_grad()
def column_and_slash_sums(
    shard: ShardTensors, rows: Tensor, *, first_row: int, scale: float, collectives: Collectives
) -> Tensor:
    """[2, H, seq_len]: attention of probe rows, summed by key and by distance. Not yet summed over ranks.

    rows [H, R, D] (any R): the queries at positions first_row, first_row + 1 ... Raises ValueError where tile_keys is
    0.
    """
    heads, count, dim = rows.shape
    keys = tile_keys(shard, count)
    if not keys:
        raise ValueError("shard: the probe's kernels do not cover it (see tile_keys)")
    k = shard.k[0] if shard.k.stride(-1) == 1 else shard.k[0].contiguous()
    positions = shard.positions.contiguous()
    capacity, tiles = _row_capacity(count), triton.cdiv(k.shape[0], keys)
    chunks = triton.cdiv(tiles, TILES_A_PROGRAM)
    common = {
        "rows": rows.contiguous(), "k": k, "positions": positions, "k_s": k.stride(0), "k_h": k.stride(1),
        "tokens": k.shape[0], "tiles": tiles, "chunks": chunks, "seq_len": shard.seq_len_tokens,
        "first_row": first_row, "count": count, "scale": scale, "GROUP": heads // k.shape[1], "R": capacity,
        "T": keys, "D": dim, "CHUNK": TILES_A_PROGRAM, "PRECISION": "ieee" if k.element_size() > 2 else "tf32",
        "num_warps": 4, "num_stages": 2,
    }
    parts = torch.empty(2, heads, chunks, capacity, dtype=torch.float32, device=k.device)
    run(peaks_kernel, (heads * chunks,), peaks=parts[0], totals=parts[1], **common)
    peaks, totals = _combined(parts[..., :count], collectives)
    sums = torch.zeros(2, heads, shard.seq_len_tokens, dtype=torch.float32, device=k.device)
    group = heads // k.shape[1]
    at_once = max(1, WEIGHTS_AT_ONCE // (group * capacity * tiles * keys)) * group
    for first in range(0, heads, at_once):
        here = min(at_once, heads - first)
        weights = torch.empty(here, capacity, tiles * keys, dtype=torch.float32, device=k.device)
        run(columns_kernel, (here * chunks,), peaks=peaks, totals=totals, columns=sums[0], weights=weights,
            first_head=first, **common)
        run(slashes_kernel, (tiles, here), weights, positions, sums[1], tiles, shard.seq_len_tokens, first_row,
            first, R=capacity, T=keys)
    return sums


def _combined(parts: Tensor, collectives: Collectives) -> tuple[Tensor, Tensor]:
    """(peaks, totals) [H, R] over all chunks and ranks from [2, H, chunks, R]; finite where a row sees anything."""
    peaks, totals = parts
    lowest = torch.finfo(peaks.dtype).min
    local = peaks.amax(1).clamp_(min=lowest)
    top = collectives.all_reduce_max(local.contiguous())
    total = (totals * (peaks - top[:, None]).exp_()).sum(1)
    return top, collectives.all_reduce_sum(total.contiguous())
