"""Selectors against worked cases, against plain numpy, and by shards against the unsharded choice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_cases import GOLDEN
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.select.choose import (
    ALONE,
    Collectives,
    FixedBudget,
    FlexBudget,
    HeadBudget,
    ShardTensors,
    choose_moba_block,
    choose_vertical_slash,
    choose_xattention,
    kept_mass_probe,
    kept_mass_sampled,
    sink_window,
    vertical_slash_budgets,
)
from sparsering.kernels.select.probe import kept_mass
from sparsering.kernels.select.top import counts_for_mass, diagonals_of, highest, positions_of, take_highest

PLACEMENTS = [
    ("contiguous", 2, 512),
    ("striped by blocks", 4, 64),
    ("striped by tokens", 4, 1),
    ("striped by 128", 2, 128),
]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"choose-{name}.npz") as z:
        return {key: z[key] for key in z.files}


def shard_of(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    ranks: int = 1,
    rank: int = 0,
    granularity: int | None = None,
    seq_len: int | None = None,
    documents: torch.Tensor | None = None,
) -> ShardTensors:
    """One rank's share of q, k [S, H, D], striped by `granularity` tokens."""
    granularity = granularity or q.shape[0] // ranks
    at = torch.arange(q.shape[0])
    own = at[at // granularity % ranks == rank]
    return ShardTensors(
        q=q[None, own],
        k=k[None, own],
        positions=own,
        seq_len_tokens=seq_len or q.shape[0],
        block_size=block_size,
        granularity_tokens=granularity,
        documents=documents,
    )


def on_ranks(ranks: int, work: Callable[[int, Collectives], object]) -> list:
    """Run work(rank, collectives) on threads whose collectives really reduce over all of them."""
    barrier = threading.Barrier(ranks)
    posted: list = [None] * ranks
    results: list = [None] * ranks

    def reduce_with(rank: int, combine: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
        def call(x: torch.Tensor) -> torch.Tensor:
            assert x.is_contiguous()
            posted[rank] = x
            barrier.wait()
            total = combine(torch.stack(posted)).to(x.dtype)
            barrier.wait()
            return total

        return call

    def run(rank: int) -> None:
        try:
            results[rank] = work(
                rank,
                Collectives(
                    all_reduce_sum=reduce_with(rank, lambda x: x.sum(0)),
                    all_reduce_max=reduce_with(rank, lambda x: x.amax(0)),
                ),
            )
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def lists_of(mask: AttentionMask) -> tuple[list[list[int]], list[list[int]]]:
    """(columns, diagonals) of every head as lists."""
    assert mask.columns is not None
    return (
        [[c for c in row if c < mask.seq_len_tokens] for row in mask.columns.tolist()],
        [row.nonzero().flatten().tolist() for row in mask.active],
    )


def golden_lists(data: dict[str, np.ndarray], kind: str) -> tuple[list[list[int]], list[list[int]]]:
    def split(key: str) -> list[list[int]]:
        return [part.tolist() for part in np.split(data[key], data[f"{key}_offsets"][1:-1])]

    return split(f"{kind}_columns"), split(f"{kind}_diagonals")


def golden_budget(data: dict[str, np.ndarray], kind: str) -> HeadBudget:
    if kind == "fixed":
        return FixedBudget(columns=int(data["fixed"][0]), slashes=int(data["fixed"][1]))
    mass, cap = float(data["flex"][0]), int(data["flex"][1])
    return FlexBudget(column_mass=mass, column_cap=cap, slash_mass=mass, slash_cap=cap)


def choose_golden(
    data: dict[str, np.ndarray],
    heads: list[HeadBudget],
    *,
    collectives: Collectives = ALONE,
    dtype: torch.dtype = torch.float64,
    **shard_options,
):
    q, k = (torch.from_numpy(data[name]).to(dtype) for name in ("q", "k"))
    shard = shard_of(q, k, block_size=int(data["block_size"]), **shard_options)
    budgets = vertical_slash_budgets(heads, seq_len_tokens=q.shape[0])
    return choose_vertical_slash(
        shard, budgets, scale=float(data["scale"]), collectives=collectives, probe_queries=int(data["probe_queries"])
    )


@pytest.mark.parametrize("name", ["structured", "long"])
@pytest.mark.parametrize("kind", ["fixed", "flex"])
def test_agrees_with_the_worked_case(name, kind):
    data = load(name)
    heads = [golden_budget(data, kind)] * data["q"].shape[1]
    choice = choose_golden(data, heads)
    assert lists_of(choice.mask) == golden_lists(data, kind)
    assert choice.column_counts.tolist() == [len(c) for c in golden_lists(data, kind)[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heads_of_one_layer_may_differ_in_kind(dtype):
    data = load("structured")
    kinds = ["fixed", "flex", "flex", "fixed"]
    choice = choose_golden(data, [golden_budget(data, kind) for kind in kinds], dtype=dtype)
    wanted = [golden_lists(data, kind) for kind in kinds]
    columns, diagonals = lists_of(choice.mask)
    assert columns == [wanted[head][0][head] for head in range(4)]
    assert diagonals == [wanted[head][1][head] for head in range(4)]


@pytest.mark.parametrize("placement, ranks, granularity", PLACEMENTS)
@pytest.mark.parametrize("kind", ["fixed", "flex"])
def test_every_rank_chooses_what_one_rank_would(kind, placement, ranks, granularity):
    data = load("structured")
    heads = [golden_budget(data, kind)] * 4
    choices = on_ranks(
        ranks,
        lambda rank, collectives: choose_golden(
            data, heads, collectives=collectives, ranks=ranks, rank=rank, granularity=granularity
        ),
    )
    for choice in choices:
        assert lists_of(choice.mask) == golden_lists(data, kind), placement


def test_a_wrong_placement_fails():
    data = load("structured")
    heads = [golden_budget(data, "fixed")] * 4

    def choose(rank: int, collectives: Collectives):
        return choose_golden(data, heads, collectives=collectives, ranks=2, rank=1 - rank if rank else rank)

    assert lists_of(on_ranks(2, choose)[0].mask) != golden_lists(data, "fixed")


@pytest.mark.parametrize("seq_len", [1000, 65, 40])
def test_padding_changes_nothing(seq_len):
    data = load("structured")
    q, k = (torch.from_numpy(data[name]) for name in ("q", "k"))
    budgets = vertical_slash_budgets(
        [FixedBudget(columns=20, slashes=30), FlexBudget(column_mass=0.5, column_cap=40, slash_mass=0.5, slash_cap=40)]
        * 2,
        seq_len_tokens=seq_len,
    )

    def choose(length: int) -> AttentionMask:
        padded_q, padded_k = q[:length].clone(), k[:length].clone()
        padded_q[seq_len:], padded_k[seq_len:] = torch.nan, torch.nan
        shard = shard_of(padded_q, padded_k, block_size=64, seq_len=seq_len, granularity=1)
        return choose_vertical_slash(shard, budgets, scale=0.2).mask

    assert lists_of(choose(1024)) == lists_of(choose(seq_len))


def numpy_sums(q: np.ndarray, k: np.ndarray, scale: float, *, raw: bool) -> tuple[np.ndarray, np.ndarray]:
    """Column and distance sums of one head [S, D] as the research code takes them: probabilities / rows, or logits."""
    length, rows = q.shape[0], min(64, q.shape[0])
    logits = q[-rows:] @ k.T * scale
    at = np.arange(length - rows, length)
    seen = np.arange(length)[None] <= at[:, None]
    p = np.exp(np.where(seen, logits, -np.inf))
    values = np.where(seen, logits, -np.inf) if raw else p / p.sum(1, keepdims=True) / rows
    slashes = np.zeros(length)
    for row in range(rows):
        for key in range(at[row] + 1):
            slashes[at[row] - key] += values[row, key]
    return values.sum(0), slashes


def numpy_top(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def numpy_diagonals(distances: list[int], block: int, length: int) -> list[int]:
    both = {s // block for s in distances} | {-(-s // block) for s in distances} | {0}
    return sorted(d for d in both if d < -(-length // block))


@pytest.mark.parametrize("ranks, granularity", [(1, 512), (2, 64), (4, 1)])
def test_mtraining_compatibility_counts_as_the_research_code(ranks, granularity):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(512, 4, 16)) + 0.5, rng.normal(size=(512, 2, 16))
    # High logits on keys that the first probe queries cannot see: by probability they would be chosen.
    k[-40:] += 0.5
    heads = [
        FixedBudget(columns=40, slashes=150),
        FlexBudget(column_mass=0.5, column_cap=300, slash_mass=0.3, slash_cap=60),
        FixedBudget(columns=10, slashes=128),
        FlexBudget(column_mass=0.001, column_cap=300, slash_mass=0.9, slash_cap=20),
    ]
    budgets = vertical_slash_budgets(heads, seq_len_tokens=512)
    choices = on_ranks(
        ranks,
        lambda rank, collectives: choose_vertical_slash(
            shard_of(
                torch.from_numpy(q), torch.from_numpy(k), block_size=64, ranks=ranks, rank=rank, granularity=granularity
            ),
            budgets,
            scale=0.25,
            collectives=collectives,
            compat="mtraining",
        ),
    )
    wanted_columns, wanted_diagonals = [], []
    for head, budget in enumerate(heads):
        fixed = isinstance(budget, FixedBudget)
        columns, slashes = numpy_sums(q[:, head], k[:, head // 2], 0.25, raw=fixed)
        if fixed:
            columns[:30], slashes[:100] = np.inf, np.inf
            counts = budget.columns, budget.slashes
        else:
            counts = [
                min(int((np.cumsum(-np.sort(-scores)) < mass).sum()), cap)
                for scores, mass, cap in (
                    (columns, budget.column_mass, budget.column_cap),
                    (slashes, budget.slash_mass, budget.slash_cap),
                )
            ]
        wanted_columns.append(numpy_top(columns, counts[0]))
        wanted_diagonals.append(numpy_diagonals(numpy_top(slashes, counts[1]), 64, 512))
    assert wanted_columns[3] == [], "the research code may keep no column at all"
    for choice in choices:
        assert lists_of(choice.mask) == (wanted_columns, wanted_diagonals)


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=30), count=st.integers(0, 30))
def test_ties_go_to_the_lower_index(scores, count):
    tensor = torch.tensor([scores], dtype=torch.float32)
    count = min(count, len(scores))
    taken = take_highest(tensor, torch.tensor([count]), highest(tensor, max(count, 1)))
    wanted = sorted(sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count])
    assert taken[0].nonzero().flatten().tolist() == wanted
    assert positions_of(taken, 30).tolist() == [wanted + [len(scores)] * (30 - count)]


@given(scores=st.lists(st.integers(0, 9), min_size=1, max_size=20), cap=st.integers(1, 20), tenths=st.integers(1, 10))
def test_the_smallest_set_with_the_mass(scores, cap, tenths):
    tensor = torch.tensor([scores], dtype=torch.float64)
    total = sum(scores)
    count = int(counts_for_mass(highest(tensor, cap), tensor.sum(-1), torch.tensor([tenths / 10]).double()))
    best = sorted(scores, reverse=True)
    enough = [n for n in range(1, len(scores) + 1) if sum(best[:n]) * 10 >= tenths * total]
    assert count == min(enough[0], cap, len(scores))


@given(distances=st.sets(st.integers(0, 49)), length=st.integers(1, 50), block=st.integers(1, 9))
def test_a_distance_activates_the_two_diagonals_it_touches(distances, length, block):
    kept = sorted(d for d in distances if d < length)
    tensor = torch.zeros(1, length, dtype=torch.bool)
    tensor[0, kept] = True
    assert diagonals_of(tensor, block)[0].nonzero().flatten().tolist() == numpy_diagonals(kept, block, length)


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
        lambda rank, collectives: choose_xattention(
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
            stride=4,
            mass=mass,
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
    mask = choose_xattention(
        shard_of(torch.from_numpy(q), torch.from_numpy(k), block_size=8), scale=0.4, stride=4, mass=0.7
    )
    wanted = brute_xattention(q[:, 0], k[:, 0], scale=0.4, block=8, stride=4, mass=0.7)
    assert np.array_equal(mask.active[0].numpy(), wanted)


@pytest.mark.parametrize("ranks, granularity", [(1, 96), (2, 1), (3, 16)])
def test_moba_block_agrees_with_a_plain_count(ranks, granularity):
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(96, 4, 8)), rng.normal(size=(96, 2, 8))
    length, block, chunk, top = 90, 8, 16, 3
    choices = on_ranks(
        ranks,
        lambda rank, collectives: choose_moba_block(
            shard_of(
                torch.from_numpy(q),
                torch.from_numpy(k),
                block_size=block,
                ranks=ranks,
                rank=rank,
                granularity=granularity,
                seq_len=length,
            ),
            chunk_tokens=chunk,
            top_chunks=top,
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


def test_sink_window_keeps_sinks_and_whole_diagonals():
    choice = sink_window(heads=2, seq_len_tokens=300, block_size=64, sink_tokens=4, window_tokens=66)
    assert lists_of(choice.mask) == ([[0, 1, 2, 3]] * 2, [[0, 1, 2]] * 2)
    dense = sink_window(heads=1, seq_len_tokens=300, block_size=64, sink_tokens=0, window_tokens=300).mask
    assert dense.active.all() and dense.column_capacity == 0


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
    mask = sink_window(
        heads=4, seq_len_tokens=1024, block_size=64, sink_tokens=9, window_tokens=60, documents=documents
    ).mask
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
    masks = [
        sink_window(heads=4, seq_len_tokens=1024, block_size=64, sink_tokens=4, window_tokens=n).mask
        for n in (64, 1024)
    ]
    first, again, other = (kept_mass_sampled(shard, masks[0], scale=0.2, seed=seed, rows=32) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(kept_mass_sampled(shard, masks[1], scale=0.2, seed=0), torch.ones(4).double())


@pytest.mark.gpu
def test_choosing_on_a_gpu_agrees_and_never_waits_for_it():
    data = load("structured")
    q, k = (torch.from_numpy(data[name]) for name in ("q", "k"))
    heads = [golden_budget(data, kind) for kind in ("fixed", "flex", "fixed", "flex")]

    def choose_all(device: str) -> list[AttentionMask]:
        x, y = q.to(device), k.to(device)
        shard = ShardTensors(
            q=x[None],
            k=y[None],
            positions=torch.arange(1024, device=device),
            seq_len_tokens=1024,
            block_size=64,
            granularity_tokens=1024,
        )
        budgets = vertical_slash_budgets(heads, seq_len_tokens=1024, device=device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            chosen = [
                choose_vertical_slash(shard, budgets, scale=float(data["scale"])).mask,
                choose_vertical_slash(shard, budgets, scale=float(data["scale"]), compat="mtraining").mask,
                choose_xattention(shard, scale=0.2),
                choose_moba_block(shard, chunk_tokens=128, top_chunks=3),
            ]
            kept_mass_probe(shard, chosen[0], scale=0.2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [mask.to("cpu") for mask in chosen]

    for ours, wanted in zip(choose_all("cuda"), choose_all("cpu"), strict=True):
        assert torch.equal(ours.active, wanted.active)
        assert wanted.columns is None or (ours.columns is not None and torch.equal(ours.columns, wanted.columns))


def _shard(**changes) -> ShardTensors:
    x = torch.zeros(1, 32, 2, 4)
    return ShardTensors(
        **{
            "q": x,
            "k": x,
            "positions": torch.arange(32),
            "seq_len_tokens": 32,
            "block_size": 8,
            "granularity_tokens": 32,
            **changes,
        }
    )


def test_refusals_name_the_value():
    budgets = vertical_slash_budgets([FixedBudget(columns=1, slashes=1)] * 2, seq_len_tokens=32)
    packed = _shard(documents=torch.zeros(32).int())
    with pytest.raises(ValueError, match=r"q, k: shapes \(2, 32"):
        _shard(q=torch.zeros(2, 32, 2, 4))
    with pytest.raises(ValueError, match="granularity_tokens: 5"):
        _shard(granularity_tokens=5)
    with pytest.raises(ValueError, match="documents: vertical-slash"):
        choose_vertical_slash(packed, budgets, scale=1.0)
    with pytest.raises(ValueError, match="documents: xattention"):
        choose_xattention(packed, scale=1.0, stride=4)
    with pytest.raises(ValueError, match="documents: moba-block"):
        choose_moba_block(packed, chunk_tokens=8, top_chunks=1)
    with pytest.raises(ValueError, match="compat: 'flex'"):
        choose_vertical_slash(_shard(), budgets, scale=1.0, compat="flex")
    with pytest.raises(ValueError, match="budgets: for 2 heads, the shard has 1"):
        choose_vertical_slash(_shard(q=torch.zeros(1, 32, 1, 4), k=torch.zeros(1, 32, 1, 4)), budgets, scale=1.0)
    with pytest.raises(ValueError, match="stride: 3"):
        choose_xattention(_shard(), scale=1.0, stride=3)
    with pytest.raises(ValueError, match="granularity_tokens: 4 is no multiple of the block of 8"):
        choose_xattention(_shard(seq_len_tokens=64, granularity_tokens=4), scale=1.0, stride=4)
    with pytest.raises(ValueError, match="chunk_tokens: 12"):
        choose_moba_block(_shard(), chunk_tokens=12, top_chunks=1)
    with pytest.raises(ValueError, match=r"head 1: FlexBudget.* mass outside"):
        vertical_slash_budgets(
            [FixedBudget(columns=1, slashes=1), FlexBudget(column_mass=1.5, column_cap=1, slash_mass=0.5, slash_cap=1)],
            seq_len_tokens=32,
        )
    with pytest.raises(ValueError, match=r"head 0: FixedBudget.* negative"):
        vertical_slash_budgets([FixedBudget(columns=-1, slashes=1)], seq_len_tokens=32)
