"""Selectors of blocks against plain counts, alone and by shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from select_cases import on_ranks, shard_of
from sparsering.kernels.select.moba_block import MobaBlock
from sparsering.kernels.select.probe import kept_mass
from sparsering.kernels.select.rows.block_mass import BlockMass
from sparsering.kernels.select.rows.xattention import XAttention


def brute_xattention(q: np.ndarray, k: np.ndarray, *, scale: float, block: int, stride: int, mass: float) -> np.ndarray:
    """bool [N, N] of one head, token by token."""
    length = q.shape[0]
    cells, blocks = -(-length // stride), -(-length // block)
    logits = np.full((cells, cells), -np.inf)
    for a in range(cells):
        for c in range(a + 1):
            pairs = [(a * stride + stride - 1 - s, c * stride + s) for s in range(stride)]
            logits[a, c] = sum(q[i] @ k[j] for i, j in pairs if i < length and j < length) * scale / stride
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    active = np.zeros((blocks, blocks), dtype=bool)
    per = block // stride
    for row in range(blocks):
        scores = [p[row * per : (row + 1) * per, b * per : (b + 1) * per].sum() for b in range(blocks)]
        chosen = {0, row}
        for b in sorted((b for b in range(row) if b not in chosen), key=lambda b: (-scores[b], b)):
            if sum(scores[c] for c in chosen) >= mass * sum(scores):
                break
            chosen.add(b)
        active[row, sorted(chosen)] = True
    return active


@pytest.mark.parametrize("ranks, granularity", [(1, 128), (2, 16), (4, 32)])
@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_xattention_agrees_with_a_token_by_token_count(ranks, granularity, mass):
    rng = np.random.default_rng(1)
    q, k = 3 * rng.normal(size=(128, 4, 8)), rng.normal(size=(128, 2, 8))
    choices = on_ranks(
        ranks,
        lambda rank, collectives: XAttention(stride=4, mass=mass).choose(
            shard_of(
                torch.from_numpy(q),
                torch.from_numpy(k),
                block_size=16,
                ranks=ranks,
                rank=rank,
                granularity=granularity,
                seq_len=117,
            ),
            scale=0.5,
            collectives=collectives,
        ),
    )
    for head in range(4):
        wanted = brute_xattention(q[:117, head], k[:117, head // 2], scale=0.5, block=16, stride=4, mass=mass)
        assert 15 < wanted.sum() < 36
        for mask in choices:
            assert np.array_equal(mask.active[head].numpy(), wanted)


def test_xattention_of_a_ragged_single_shard():
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(53, 1, 8)), rng.normal(size=(53, 1, 8))
    shard = shard_of(torch.from_numpy(q), torch.from_numpy(k), block_size=8)
    mask = XAttention(stride=4, mass=0.7).choose(shard, scale=0.4)
    wanted = brute_xattention(q[:, 0], k[:, 0], scale=0.4, block=8, stride=4, mass=0.7)
    assert np.array_equal(mask.active[0].numpy(), wanted)


@pytest.mark.parametrize("ranks, granularity", [(1, 96), (2, 1), (3, 16)])
def test_moba_block_agrees_with_a_plain_count(ranks, granularity):
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(96, 4, 8)), rng.normal(size=(96, 2, 8))
    length, block, chunk, top = 90, 8, 16, 3
    choices = on_ranks(
        ranks,
        lambda rank, collectives: MobaBlock(chunk_tokens=chunk, top_chunks=top).choose(
            shard_of(
                torch.from_numpy(q),
                torch.from_numpy(k),
                block_size=block,
                ranks=ranks,
                rank=rank,
                granularity=granularity,
                seq_len=length,
            ),
            scale=1.0,
            collectives=collectives,
        ),
    )
    blocks = -(-length // block)
    for head in range(4):
        wanted = np.zeros((blocks, blocks), dtype=bool)
        for row in range(blocks):
            mean_q = q[row * block : min((row + 1) * block, length), head].mean(0)
            own = row * block // chunk
            gate = [k[c * chunk : min((c + 1) * chunk, length), head // 2].mean(0) @ mean_q for c in range(own)]
            chosen = [own, *sorted(range(own), key=lambda c, gate=gate: (-gate[c], c))[: top - 1]]
            wanted[row] = [col * block // chunk in chosen and col <= row for col in range(blocks)]
        for mask in choices:
            assert np.array_equal(mask.active[head].numpy(), wanted)


def brute_block_mass(
    q: np.ndarray, k: np.ndarray, *, scale: float, block: int, stride: int, least: float, softcap: float | None = None
) -> np.ndarray:
    """bool [N, N] of one head, query by query."""
    length = q.shape[0]
    blocks = -(-length // block)
    active = np.zeros((blocks, blocks), dtype=bool)
    for row in range(blocks):
        scores = np.zeros(blocks)
        for probe in range(row * block + stride - 1, (row + 1) * block, stride):
            at = min(probe, length - 1)
            logits = k[: at + 1] @ q[at] * scale
            logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
            p = np.exp(logits - logits.max())
            p = np.append(p / p.sum(), np.zeros(blocks * block - at - 1))
            scores += p.reshape(blocks, block).sum(1) * stride / block
        active[row] = (scores >= least) | np.isin(np.arange(blocks), [0, row])
    return active


@pytest.mark.parametrize("ranks, granularity", [(1, 128), (2, 16), (4, 32)])
@pytest.mark.parametrize("least, stride, softcap", [(0.2, 4, None), (0.1, 1, None), (0.12, 16, 2.0)])
def test_block_mass_agrees_with_a_query_by_query_count(ranks, granularity, least, stride, softcap):
    rng = np.random.default_rng(1)
    q, k = 3 * rng.normal(size=(128, 4, 8)), rng.normal(size=(128, 2, 8))
    selector, tensors = BlockMass(probe_stride=stride, least_mass=least), (torch.from_numpy(q), torch.from_numpy(k))

    def choose(rank, collectives):
        shard = shard_of(*tensors, block_size=16, ranks=ranks, rank=rank, granularity=granularity, seq_len=117)
        return selector.choose(replace(shard, softcap=softcap), scale=0.5, collectives=collectives)

    choices = on_ranks(ranks, choose)
    for head in range(4):
        wanted = brute_block_mass(
            q[:117, head], k[:117, head // 2], scale=0.5, block=16, stride=stride, least=least, softcap=softcap
        )
        assert 15 < wanted.sum() < 36
        for mask in choices:
            assert np.array_equal(mask.active[head].numpy(), wanted)


def test_a_block_is_left_out_when_all_queries_together_pay_it_less() -> None:
    """With a stride of one the mean share is that of the row itself: kept mass sees what a block is worth."""
    generator = torch.Generator().manual_seed(7)
    q, k = 3 * torch.randn(128, 1, 8, generator=generator), torch.randn(128, 1, 8, generator=generator)
    shard = shard_of(q.double(), k.double(), block_size=16)
    mask = BlockMass(probe_stride=1, least_mass=0.1).choose(shard, scale=0.4)
    rows, own = torch.arange(96, 112), torch.zeros(1, 8, 8, dtype=torch.bool)
    own[:, range(8), range(8)] = True
    alone = kept_mass(shard, replace(mask, active=own), rows, scale=0.4)
    for block in range(1, 6):
        more = own.clone()
        more[0, 6, block] = True
        its = kept_mass(shard, replace(mask, active=more), rows, scale=0.4) - alone
        assert bool(mask.active[0, 6, block]) == bool(its >= 0.1)
    assert 0 < mask.active[0, 6, 1:6].sum() < 5


@pytest.mark.parametrize("end", [53, 70])
def test_a_packed_document_that_ends_within_a_block_gets_what_it_gets_alone(end: int) -> None:
    """The last of its probes stands in for those that are of the document behind it."""
    generator, selector = torch.Generator().manual_seed(9), BlockMass(probe_stride=4, least_mass=0.15)
    q, k = 3 * torch.randn(96, 2, 8, generator=generator), torch.randn(96, 2, 8, generator=generator)
    documents = (torch.arange(96) >= end).int()
    packed = selector.choose(shard_of(q, k, block_size=8, documents=documents), scale=0.4).active
    alone = selector.choose(shard_of(q[:end], k[:end], block_size=8), scale=0.4).active
    blocks = alone.shape[1]
    assert torch.equal(packed[:, :blocks, :blocks], alone)
    assert not alone.all()
    assert not packed[:, blocks:, : end // 8].any()


CHOOSING_APART = [
    XAttention(stride=4, mass=0.6),
    MobaBlock(chunk_tokens=16, top_chunks=2),
    BlockMass(probe_stride=4, least_mass=0.25),
]


@pytest.mark.parametrize("selector", CHOOSING_APART, ids=lambda one: one.name)
@pytest.mark.parametrize("ranks, granularity", [(1, 160), (2, 16), (5, 32)])
def test_each_packed_document_gets_what_it_gets_alone(ranks: int, granularity: int, selector) -> None:
    """Documents of whole blocks; nothing is active between them."""
    generator, block, lengths = torch.Generator().manual_seed(3), 16, (48, 16, 96)
    q, k = 3 * torch.randn(160, 4, 8, generator=generator), torch.randn(160, 2, 8, generator=generator)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int()

    def choose(rank, collectives):
        shard = shard_of(q, k, block_size=block, ranks=ranks, rank=rank, granularity=granularity, documents=documents)
        return selector.choose(shard, scale=0.4, collectives=collectives)

    wanted = torch.zeros(4, 10, 10, dtype=torch.bool)
    first = 0
    for length in lengths:
        part = slice(first, first + length)
        alone = selector.choose(shard_of(q[part], k[part], block_size=block), scale=0.4)
        at = slice(first // block, (first + length) // block)
        wanted[:, at, at] = alone.active
        first += length
    for mask in on_ranks(ranks, choose):
        assert torch.equal(mask.active, wanted)
        assert torch.equal(mask.documents, documents)


@pytest.mark.parametrize("selector", CHOOSING_APART, ids=lambda one: one.name)
def test_what_lies_in_another_document_does_not_change_what_is_chosen(selector) -> None:
    generator, block = torch.Generator().manual_seed(5), 16
    q, k = 3 * torch.randn(160, 2, 8, generator=generator), torch.randn(160, 2, 8, generator=generator)
    documents = (torch.arange(160) >= 70).int()
    before = selector.choose(shard_of(q, k, block_size=block, documents=documents), scale=0.4).active
    q[:70] = torch.randn(70, 2, 8, generator=generator)
    k[:70] = 5 * torch.randn(70, 2, 8, generator=generator)
    after = selector.choose(shard_of(q, k, block_size=block, documents=documents), scale=0.4).active
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not before[:, 5:, :4].any()
    assert not torch.equal(before[:, :4], after[:, :4])


def test_a_block_of_two_documents_looks_for_the_one_it_begins_in() -> None:
    """MoBA-like, token by token: the first document ends inside block 2, of whose rows it has the first ones."""
    generator, block, end = torch.Generator().manual_seed(7), 16, 40
    q, k = torch.randn(128, 1, 8, generator=generator), torch.randn(128, 1, 8, generator=generator)
    documents = (torch.arange(128) >= end).int()
    selector = MobaBlock(chunk_tokens=16, top_chunks=2)
    active = selector.choose(shard_of(q, k, block_size=block, documents=documents), scale=1.0).active[0]
    for row in range(8):
        first, document = row * block, documents[row * block]
        own = [t for t in range(first, first + block) if documents[t] == document]
        mean = q[own, 0].mean(0)
        scores = {}
        for chunk in range(row):
            tokens = [t for t in range(chunk * 16, chunk * 16 + 16) if documents[t] == document]
            if documents[chunk * 16 + 15] == document:
                scores[chunk] = float(mean @ k[tokens, 0].mean(0))
        wanted = {row, *sorted(scores, key=lambda chunk: -scores[chunk])[:1]}
        assert set(active[row].nonzero()[:, 0].tolist()) == wanted
