"""block_mass.py's choice on GPUs: one pass over all keys for the probed queries, and their mean shares.

The first kernel leaves, for each probe and key block, the logarithm of the softmax numerators' sum; the second turns
them into shares, takes their mean over the probes of a query block, and keeps blocks that get enough.
Shape legend: T local query tiles of P probes, N key blocks of BLOCK tokens, M probes of a Triton tile.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...head_dims import CHOOSING_HEAD_DIMS
from ...jit import run
from ..probe import ShardTensors
from .probed import ProbedRows
from .selector import first_blocks

# Sums held at once (float32): bounds the memory of long sequences.
SUMS_AT_ONCE = 1 << 27
# Key blocks that a program goes through: it loads its queries once for all of them.
KEY_BLOCKS = 32
MOST_PROBES = 128
LOG2_E = math.log2(math.e)


@triton.jit
def log2_sums(logits, scale, cap):
    """log2 [M] of the sums over [M, N] of 2^(scale * logits), softcapped; -inf where all logits are. scale > 0."""
    if cap is not None:
        # tanh, in terms of 2^x: `scale` and `cap` hold the factor log2(e).
        shrunk = 2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * scale * logits / cap)) - 1.0
        logits = tl.where(logits == float("-inf"), logits, cap / scale * shrunk)
    peak = tl.max(logits, 1) * scale
    base = tl.where(peak == float("-inf"), 0.0, peak)
    # One multiply-add and one exponential a score: this is what choosing costs.
    total = tl.sum(tl.exp2(logits * scale - base[:, None]), 1)
    return peak + tl.log2(tl.where(total > 0.0, total, 1.0))


@triton.jit
def probe_sums_kernel(q, keys, documents, positions, local, sums, q_s, q_h, k_h, rows, seq_len, key_blocks, scale, cap,
                      GROUP: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
                      PRECISION: tl.constexpr):
    """sums float32 [H, N, rows]: log2 of the summed 2^logits of key blocks; -inf for those that a row does not see.

    positions, local int64 [rows]: see ProbedRows. Grid (ceil(N / RUN), ceil(rows / M), H); blocks that no row of a
    program sees are not written. Blocks that all of its rows see whole are not masked.
    """
    head = tl.program_id(2)
    at = tl.program_id(1) * M + tl.arange(0, M)
    inside = at < rows
    position = tl.load(positions + at, mask=inside, other=-1).to(tl.int32)
    position = tl.where(position < seq_len, position, -1)
    first = tl.program_id(0) * RUN
    last = tl.minimum(tl.minimum(first + RUN, key_blocks), tl.max(position, 0) // BLOCK + 1)
    if tl.max(position, 0) >= first * BLOCK:
        dims = tl.arange(0, D)
        row = tl.load(local + at, mask=inside, other=0)
        queries = tl.load(q + head.to(tl.int64) * q_h + row[:, None] * q_s + dims[None, :],
                          mask=(position >= 0)[:, None], other=0.0)
        line = sums + head.to(tl.int64) * key_blocks * rows + at
        k_base = keys + (head // GROUP).to(tl.int64) * k_h
        masked = first
        if documents is None:
            # Rows that are none (position -1) are never read, so they need no mask.
            earliest = tl.min(tl.where(position >= 0, position, 2147483647), 0)
            masked = tl.maximum(tl.minimum((earliest + 1) // BLOCK, last), first)
            for block in range(first, masked):
                token = block * BLOCK + tl.arange(0, BLOCK)
                k = tl.load(k_base + token.to(tl.int64)[:, None] * D + dims[None, :])
                found = log2_sums(tl.dot(queries, tl.trans(k), input_precision=PRECISION), scale, cap)
                tl.store(line + tl.cast(block, tl.int64) * rows, found, mask=inside)
        else:
            own = tl.load(documents + position, mask=position >= 0, other=-1)
        for block in range(masked, last):
            token = block * BLOCK + tl.arange(0, BLOCK)
            k = tl.load(k_base + token.to(tl.int64)[:, None] * D + dims[None, :])
            logits = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
            seen = token[None, :] <= position[:, None]
            if documents is not None:
                seen = seen & (tl.load(documents + token, mask=token < seq_len, other=-2)[None, :] == own[:, None])
            found = log2_sums(tl.where(seen, logits, float("-inf")), scale, cap)
            tl.store(line + tl.cast(block, tl.int64) * rows, found, mask=inside)


@triton.jit
def mean_masses_kernel(sums, positions, blocks, firsts, active, tiles, key_blocks, seq_len, least_mass,
                       PROBES: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """active uint8 [H, tiles, N]: own and first block, and those that get least_mass on average. Grid (tiles, H).

    Two passes over key blocks, SIZE at once: what each probe's attention adds up to, then shares of it.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(blocks + tile).to(tl.int32)
    probe = tl.arange(0, PROBES)
    position = tl.load(positions + tile * PROBES + probe).to(tl.int32)
    reach = tl.where(position < seq_len, position // BLOCK, -1)
    rows = tiles * PROBES
    line = sums + head.to(tl.int64) * key_blocks * rows + tile * PROBES + probe
    last = tl.minimum(block + 1, key_blocks)
    top = tl.full([PROBES], float("-inf"), tl.float32)
    total = tl.zeros([PROBES], tl.float32)
    for start in range(0, last, SIZE):
        key_block = start + tl.arange(0, SIZE)
        here = (key_block < last)[:, None] & (key_block[:, None] <= reach[None, :])
        part = tl.load(line[None, :] + key_block.to(tl.int64)[:, None] * rows, mask=here, other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(part - base[None, :]), 0)
        top = higher
    base = tl.where(top == float("-inf"), 0.0, top)
    factor = 1.0 / (PROBES * tl.where(total > 0.0, total, 1.0))
    first = tl.load(firsts + tl.minimum(block, key_blocks - 1))
    out = active + (head.to(tl.int64) * tiles + tile) * key_blocks
    for start in range(0, key_blocks, SIZE):
        key_block = start + tl.arange(0, SIZE)
        here = (key_block < last)[:, None] & (key_block[:, None] <= reach[None, :])
        part = tl.load(line[None, :] + key_block.to(tl.int64)[:, None] * rows, mask=here, other=float("-inf"))
        mean = tl.sum(tl.exp2(part - base[None, :]) * factor[None, :], 1)
        taken = (mean >= least_mass) | (key_block == block) | (key_block == first)
        tl.store(out + key_block, taken.to(tl.uint8), mask=key_block < key_blocks)


def applies(shard: ShardTensors, probe_stride: int, *, scale: float) -> bool:
    """Whether these kernels cover the shard: the same on every rank."""
    size = shard.block_size
    powers = size & (size - 1) == 0 and 16 <= size <= MOST_PROBES and probe_stride & (probe_stride - 1) == 0
    return scale > 0 and powers and shard.k.shape[3] in CHOOSING_HEAD_DIMS and shard.q.element_size() <= 4


def active_rows(
    shard: ShardTensors, rows: ProbedRows, keys: Tensor, *, scale: float, least_mass: float
) -> Iterator[Tensor]:
    """Uint8 [H, t, N] of some local query tiles after the other: their active key blocks.

    keys [H_kv, N * block_size, D]: those of the whole sequence.
    """
    firsts, probes = first_blocks(shard), rows.positions.shape[1]
    at_once = max(1, SUMS_AT_ONCE // (shard.heads * probes * shard.blocks))
    for start in range(0, rows.blocks.shape[0], at_once):
        part = rows.some(slice(start, start + at_once))
        sums, tiles = probe_sums(shard, part, keys, scale=scale), part.blocks.shape[0]
        active = torch.empty(shard.heads, tiles, shard.blocks, dtype=torch.uint8, device=sums.device)
        run(mean_masses_kernel, (tiles, shard.heads), sums=sums, positions=part.positions, blocks=part.blocks,
            firsts=firsts, active=active, tiles=tiles, key_blocks=shard.blocks, seq_len=shard.seq_len_tokens,
            least_mass=least_mass, PROBES=probes, BLOCK=shard.block_size, SIZE=max(8, 4096 // probes), num_warps=4)
        yield active


def probe_sums(shard: ShardTensors, rows: ProbedRows, keys: Tensor, *, scale: float) -> Tensor:
    """float32 [H, N, T * P]: log2 of the softmax numerators of each probe's attention, summed over every key block.

    What a probe does not see is not written.
    """
    heads, dim = shard.q.shape[2:]
    count = rows.positions.numel()
    m = min(128, max(16, triton.next_power_of_2(count)))
    q = shard.q[0] if shard.q.stride(-1) == 1 else shard.q[0].contiguous()
    keys = keys.contiguous()
    sums = torch.empty(heads, shard.blocks, count, dtype=torch.float32, device=q.device)
    run(probe_sums_kernel, (triton.cdiv(shard.blocks, KEY_BLOCKS), triton.cdiv(count, m), heads), q=q, keys=keys,
        documents=shard.documents, positions=rows.positions, local=rows.local, sums=sums, q_s=q.stride(0),
        q_h=q.stride(1), k_h=keys.stride(0), rows=count, seq_len=shard.seq_len_tokens, key_blocks=shard.blocks,
        scale=scale * LOG2_E, cap=None if shard.softcap is None else shard.softcap * LOG2_E,
        GROUP=heads // keys.shape[0], BLOCK=shard.block_size, RUN=KEY_BLOCKS, M=m, D=dim,
        PRECISION="ieee" if q.element_size() > 2 else "tf32", num_warps=8 if m == 128 else 4, num_stages=3)
    return sums
