"""The share of attention that a mask keeps, against a dense softmax; sinks and windows."""

from __future__ import annotations

import pytest
import torch

from select_cases import lists_of, load, on_ranks, shard_of, sink_window
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.select.probe import ShardTensors, kept_mass, kept_mass_probe, kept_mass_sampled
from sparsering.kernels.select.sink_window import dense


def test_sink_window_keeps_sinks_and_whole_diagonals():
    x = torch.zeros(300, 2, 8)
    shard = shard_of(x, x, block_size=64)
    assert lists_of(sink_window(shard, sink_tokens=4, window_tokens=66)) == ([[0, 1, 2, 3]] * 2, [[0, 1, 2]] * 2)
    everything = dense(300).choose(shard, scale=1.0)
    assert everything.active.all() and everything.column_capacity == 0


def dense_kept_mass(shard: ShardTensors, mask: AttentionMask, rows: torch.Tensor, scale: float) -> torch.Tensor:
    allowed = torch.arange(shard.seq_len_tokens)[None] <= rows[:, None]
    if shard.documents is not None:
        allowed &= shard.documents[None, :] == shard.documents[rows][:, None]
    kept = []
    for head in range(shard.heads):
        logits = shard.q[0, rows, head] @ shard.k[0, :, head // 2].T * scale
        p = torch.softmax(logits.masked_fill(~allowed, -torch.inf), -1)
        kept.append((p * whole(mask, head, rows, shard.positions)).sum(-1).mean())
    return torch.stack(kept)


@pytest.mark.parametrize("ranks, granularity", [(1, 1024), (2, 64), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_kept_mass_is_the_share_of_the_dense_softmax(ranks, granularity, packed):
    data = load("structured")
    q, k = (torch.from_numpy(data[name]) for name in ("q", "k"))
    documents = (torch.arange(1024) // 500).int() if packed else None
    alone = shard_of(q, k, block_size=64, documents=documents)
    mask = sink_window(alone, sink_tokens=9, window_tokens=60)
    shards = [
        shard_of(q, k, block_size=64, ranks=ranks, rank=rank, granularity=granularity, documents=documents)
        for rank in range(ranks)
    ]
    probe = on_ranks(ranks, lambda rank, c: kept_mass_probe(shards[rank], mask, scale=0.2, collectives=c))
    rows = torch.tensor([3, 500, 777])
    picked = on_ranks(ranks, lambda rank, c: kept_mass(shards[rank], mask, rows, scale=0.2, collectives=c))
    wanted = dense_kept_mass(alone, mask, torch.arange(960, 1024), 0.2)
    assert (wanted < 0.99).all()
    for rank in range(ranks):
        torch.testing.assert_close(probe[rank], wanted)
        torch.testing.assert_close(picked[rank], dense_kept_mass(alone, mask, rows, 0.2))


def test_sampled_kept_mass_depends_on_the_seed_and_is_one_for_dense_attention():
    data = load("structured")
    q, k = (torch.from_numpy(data[name]) for name in ("q", "k"))
    shard = shard_of(q, k, block_size=64)
    masks = [sink_window(shard, sink_tokens=4, window_tokens=n) for n in (64, 1024)]
    first, again, other = (kept_mass_sampled(shard, masks[0], scale=0.2, seed=seed, rows=32) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(kept_mass_sampled(shard, masks[1], scale=0.2, seed=0), torch.ones(4).double())
