"""The Triton kernels of the choice, in the interpreter, against the tensor operations that define them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsering.kernels.select.probe import (
    ALONE,
    ShardTensors,
    column_sums,
    last_positions,
    probabilities,
    query_rows,
    row_logits,
    slash_sums,
)
from sparsering.kernels.select.probe_triton import column_and_slash_sums, tile_keys
from sparsering.kernels.select.rows import block_mass_triton
from sparsering.kernels.select.rows.block_mass import BlockMass
from sparsering.kernels.select.rows.probed import ProbedRows
from sparsering.kernels.select.rows.xattention import XAttention
from sparsering.kernels.select.rows.xattention_triton import active_rows, applies
from sparsering.kernels.select.select_triton import take
from sparsering.kernels.select.top import diagonals_of, highest, positions_of, take_highest

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled on GPUs: see test_gpu_choose.py")


def shard_of(
    tokens: int, *, ranks: int, rank: int, granularity: int, seq_len: int, dtype: torch.dtype, **more: Any
) -> ShardTensors:
    generator = torch.Generator().manual_seed(tokens + seq_len)
    q = torch.randn(1, tokens, 4, 32, generator=generator).to(dtype)
    k = torch.randn(1, tokens, 2, 32, generator=generator).to(dtype)
    at = torch.arange(tokens)
    own = at[at // granularity % ranks == rank]
    return ShardTensors(
        q=q[:, own], k=k[:, own], positions=own, seq_len_tokens=seq_len, block_size=64, granularity_tokens=granularity,
        **more,
    )  # fmt: skip


def whole_query_rows(tokens: int, at: torch.Tensor, seq_len: int, dtype: torch.dtype) -> torch.Tensor:
    """The probe's queries, whichever shard holds them."""
    whole = shard_of(tokens, ranks=1, rank=0, granularity=tokens, seq_len=seq_len, dtype=dtype)
    return query_rows(whole, at, ALONE)


@pytest.mark.parametrize(
    ("tokens", "seq_len", "ranks", "granularity", "queries"),
    [
        (512, 512, 1, 512, 64),
        (500, 500, 1, 500, 64),  # the last tile is short
        (512, 450, 2, 128, 64),  # padding
        (512, 512, 2, 64, 20),  # fewer rows than a tile has
        (40, 40, 1, 40, 64),  # a sequence shorter than the probe
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_agree_with_the_definition(tokens, seq_len, ranks, granularity, queries, dtype):
    shapes = {"seq_len": seq_len, "ranks": ranks, "granularity": granularity, "dtype": dtype}
    for rank in range(ranks):
        shard = shard_of(tokens, rank=rank, **shapes)
        at = last_positions(shard, queries)
        rows = whole_query_rows(tokens, at, seq_len, dtype)
        got = column_and_slash_sums(shard, rows, first_row=seq_len - len(at), scale=0.3, collectives=ALONE)
        p = probabilities(row_logits(shard, rows, at, scale=0.3), ALONE)
        wanted = torch.stack([column_sums(shard, p), slash_sums(shard, p, at)])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert got[0].sum() > 1  # the rows see something here


@pytest.mark.parametrize(
    ("granularity", "queries", "keys"), [(128, 64, 128), (64, 64, 64), (64, 128, 0), (32, 16, 0), (512, 128, 128)]
)
def test_tiles_hold_consecutive_keys_and_no_fewer_than_rows(granularity, queries, keys):
    shard = shard_of(512, ranks=1, rank=0, granularity=granularity, seq_len=512, dtype=torch.float32)
    if granularity < 512:  # one rank holds everything, so say that it is cut in runs
        shard = ShardTensors(**{**vars(shard), "q": shard.q[:, :256], "k": shard.k[:, :256],
                                "positions": shard.positions[:256]})  # fmt: skip
    assert tile_keys(shard, queries) == keys


@pytest.mark.parametrize("length", [5000, 2048, 33])
@pytest.mark.parametrize("kinds", [(7, 20), (0, 1), (33, 33)])
def test_taking_agrees_with_the_definition(length, kinds):
    generator = torch.Generator().manual_seed(length)
    scores = torch.randint(0, 40, (2, 3, length), generator=generator).float()  # many ties
    scores[:, 1, :5] = torch.inf
    counts = torch.tensor(kinds)[:, None].expand(2, 3).clone()
    counts[:, 2] = counts[:, 2].clamp(max=3)
    best = highest(scores, max(kinds))
    columns, active = take(scores, counts, best, column_capacity=kinds[0], block_size=16)
    kept = take_highest(scores, counts, best)
    assert kept[0].sum(1).tolist() == counts[0].tolist()
    assert torch.equal(columns, positions_of(kept[0], kinds[0]))
    assert torch.equal(active, diagonals_of(kept[1], 16))


def by_rank(
    whole: ShardTensors, tokens: int, shapes: dict[str, Any]
) -> Iterator[tuple[ShardTensors, torch.Tensor, torch.Tensor]]:
    """Every rank's shard, its blocks, and the keys of the whole sequence, zero past its end."""
    keys, seq_len = torch.zeros(2, 512, 32), whole.seq_len_tokens
    keys[:, :seq_len] = whole.k[0, :seq_len].transpose(0, 1)
    for rank in range(shapes["ranks"]):
        shard = shard_of(tokens, rank=rank, **shapes)
        yield shard, shard.positions[::64] // 64, keys


@pytest.mark.parametrize(
    ("tokens", "seq_len", "ranks", "granularity"), [(512, 512, 1, 512), (512, 470, 2, 64), (470, 470, 1, 470)]
)
@pytest.mark.parametrize("mass", [0.4, 0.75])
def test_xattention_agrees_with_the_definition(tokens, seq_len, ranks, granularity, mass):
    shapes = {"seq_len": seq_len, "ranks": ranks, "granularity": granularity, "dtype": torch.float32}
    whole = shard_of(tokens, **{**shapes, "ranks": 1, "granularity": tokens}, rank=0)
    wanted = XAttention(stride=16, mass=mass).choose(whole, scale=0.6).active
    assert 0.2 < wanted.tril().sum() / (4 * 36) < 0.9
    for shard, blocks, keys in by_rank(whole, tokens, shapes):
        assert applies(shard, 16)
        active = torch.cat(list(active_rows(shard, blocks, keys, scale=0.6, stride=16, mass=mass)), dim=1).bool()
        assert torch.equal(active, wanted[:, blocks])


@pytest.mark.parametrize(
    ("tokens", "seq_len", "ranks", "granularity"), [(512, 512, 1, 512), (512, 470, 2, 64), (470, 470, 1, 470)]
)
@pytest.mark.parametrize(("least", "stride", "softcap", "packed"), [
    (0.1, 8, None, False), (0.15, 1, None, False), (0.15, 16, 3.0, False), (0.15, 8, None, True),
])  # fmt: skip
def test_block_mass_agrees_with_the_definition(tokens, seq_len, ranks, granularity, least, stride, softcap, packed):
    documents = (torch.arange(512) >= 200).int() if packed else None
    shapes = {"seq_len": seq_len, "ranks": ranks, "granularity": granularity, "dtype": torch.float32}
    shapes |= {"softcap": softcap, "documents": documents}
    whole = shard_of(tokens, **{**shapes, "ranks": 1, "granularity": tokens}, rank=0)
    wanted = BlockMass(probe_stride=stride, least_mass=least).choose(whole, scale=0.6).active
    assert 0.2 < wanted.tril().sum() / (4 * 36) < 0.9
    for shard, blocks, keys in by_rank(whole, tokens, shapes):
        assert block_mass_triton.applies(shard, stride, scale=0.6)
        rows = ProbedRows.of(shard, blocks, stride)
        active = torch.cat(
            list(block_mass_triton.active_rows(shard, rows, keys, scale=0.6, least_mass=least)), dim=1
        ).bool()
        assert torch.equal(active, wanted[:, blocks])
