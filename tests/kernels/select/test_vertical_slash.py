"""Vertical-slash against worked cases, against plain numpy, and by shards against the unsharded choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from select_cases import golden_lists, lists_of, load, numpy_diagonals, on_ranks, shard_of
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.select.probe import ALONE, Collectives
from sparsering.kernels.select.vertical_slash import (
    FixedVerticalSlash,
    FlexVerticalSlash,
    VerticalSlashSelector,
    choose_by_head,
)

PLACEMENTS = [
    ("contiguous", 2, 512),
    ("striped by blocks", 4, 64),
    ("striped by tokens", 4, 1),
    ("striped by 128", 2, 128),
]


def golden_selector(data: dict[str, np.ndarray], kind: str) -> VerticalSlashSelector:
    if kind == "fixed":
        return FixedVerticalSlash(columns=int(data["fixed"][0]), slashes=int(data["fixed"][1]))
    mass, cap = float(data["flex"][0]), int(data["flex"][1])
    return FlexVerticalSlash(column_mass=mass, column_cap=cap, slash_mass=mass, slash_cap=cap)


def choose_golden(
    data: dict[str, np.ndarray],
    kinds: Sequence[str],
    *,
    collectives: Collectives = ALONE,
    dtype: torch.dtype = torch.float64,
    **shard_options,
) -> AttentionMask:
    """One kind for all heads, or one for each."""
    q, k = (torch.from_numpy(data[name]).to(dtype) for name in ("q", "k"))
    shard = shard_of(q, k, block_size=int(data["block_size"]), **shard_options)
    assert data["probe_queries"] == 64
    heads = [golden_selector(data, kind) for kind in kinds]
    if len(heads) == 1:
        return heads[0].choose(shard, scale=float(data["scale"]), collectives=collectives)
    return choose_by_head(shard, [head.budget for head in heads], scale=float(data["scale"]), collectives=collectives)


@pytest.mark.parametrize("name", ["structured", "long"])
@pytest.mark.parametrize("kind", ["fixed", "flex"])
def test_agrees_with_the_worked_case(name, kind):
    data = load(name)
    assert lists_of(choose_golden(data, [kind])) == golden_lists(data, kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heads_of_one_layer_may_differ_in_kind(dtype):
    data = load("structured")
    kinds = ["fixed", "flex", "flex", "fixed"]
    columns, diagonals = lists_of(choose_golden(data, kinds, dtype=dtype))
    wanted = [golden_lists(data, kind) for kind in kinds]
    assert columns == [wanted[head][0][head] for head in range(4)]
    assert diagonals == [wanted[head][1][head] for head in range(4)]


@pytest.mark.parametrize("placement, ranks, granularity", PLACEMENTS)
@pytest.mark.parametrize("kind", ["fixed", "flex"])
def test_every_rank_chooses_what_one_rank_would(kind, placement, ranks, granularity):
    data = load("structured")
    masks = on_ranks(
        ranks,
        lambda rank, collectives: choose_golden(
            data, [kind], collectives=collectives, ranks=ranks, rank=rank, granularity=granularity
        ),
    )
    for mask in masks:
        assert lists_of(mask) == golden_lists(data, kind), placement


def test_a_wrong_placement_fails():
    data = load("structured")

    def choose(rank: int, collectives: Collectives):
        return choose_golden(data, ["fixed"], collectives=collectives, ranks=2, rank=1 - rank if rank else rank)

    assert lists_of(on_ranks(2, choose)[0]) != golden_lists(data, "fixed")


@pytest.mark.parametrize("seq_len", [1000, 65, 40])
def test_padding_changes_nothing(seq_len):
    data = load("structured")
    q, k = (torch.from_numpy(data[name]) for name in ("q", "k"))
    heads: list[VerticalSlashSelector] = [
        FixedVerticalSlash(columns=20, slashes=30),
        FlexVerticalSlash(column_mass=0.5, column_cap=40, slash_mass=0.5, slash_cap=40),
    ]

    def choose(length: int) -> AttentionMask:
        padded_q, padded_k = q[:length].clone(), k[:length].clone()
        padded_q[seq_len:], padded_k[seq_len:] = torch.nan, torch.nan
        shard = shard_of(padded_q, padded_k, block_size=64, seq_len=seq_len, granularity=1)
        return choose_by_head(shard, [head.budget for head in heads * 2], scale=0.2, collectives=ALONE)

    assert lists_of(choose(1024)) == lists_of(choose(seq_len))


def numpy_sums(q: np.ndarray, k: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Column and distance sums of the probabilities of one head [S, D]'s last 64 queries, divided by them."""
    length, rows = q.shape[0], min(64, q.shape[0])
    logits = q[-rows:] @ k.T * scale
    at = np.arange(length - rows, length)
    p = np.exp(np.where(np.arange(length)[None] <= at[:, None], logits, -np.inf))
    values = p / p.sum(1, keepdims=True) / rows
    slashes = np.zeros(length)
    for row in range(rows):
        for key in range(at[row] + 1):
            slashes[at[row] - key] += values[row, key]
    return values.sum(0), slashes


def numpy_top(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


@pytest.mark.parametrize("ranks, granularity", [(1, 512), (2, 64), (4, 1)])
def test_budgets_of_every_head_agree_with_plain_numpy(ranks, granularity):
    """The research code keeps (cumsum < mass).sum(), what stays below the mass; we keep one more, which reaches it."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(512, 4, 16)) + 0.5, rng.normal(size=(512, 2, 16))
    heads = [
        FixedVerticalSlash(columns=40, slashes=150),
        FlexVerticalSlash(column_mass=0.5, column_cap=300, slash_mass=0.3, slash_cap=60),
        FixedVerticalSlash(columns=10, slashes=128, sink_tokens=4, window_tokens=90),
        FlexVerticalSlash(column_mass=0.001, column_cap=300, slash_mass=0.9, slash_cap=20),
    ]
    masks = on_ranks(
        ranks,
        lambda rank, collectives: choose_by_head(
            shard_of(
                torch.from_numpy(q), torch.from_numpy(k), block_size=64, ranks=ranks, rank=rank, granularity=granularity
            ),
            [head.budget for head in heads],
            scale=0.25,
            collectives=collectives,
        ),
    )
    wanted_columns, wanted_diagonals = [], []
    for number, head in enumerate(heads):
        columns, slashes = numpy_sums(q[:, number], k[:, number // 2], 0.25)
        if isinstance(head, FixedVerticalSlash):
            columns[: head.sink_tokens], slashes[: head.window_tokens] = np.inf, np.inf
            counts = [head.columns, head.slashes]
        else:
            budgets = (columns, head.column_mass, head.column_cap), (slashes, head.slash_mass, head.slash_cap)
            counts = [min(int((np.cumsum(-np.sort(-scores)) < mass).sum()) + 1, cap) for scores, mass, cap in budgets]
        wanted_columns.append(numpy_top(columns, counts[0]))
        wanted_diagonals.append(numpy_diagonals(numpy_top(slashes, counts[1]), 64, 512))
    assert len(wanted_columns[3]) == 1 and len(wanted_columns[1]) < 300
    for mask in masks:
        assert lists_of(mask) == (wanted_columns, wanted_diagonals)


def test_as_many_budgets_as_heads():
    x = torch.zeros(32, 1, 4)
    budgets = [FixedVerticalSlash(columns=1, slashes=1).budget] * 2
    with pytest.raises(ValueError, match="budgets: for 2 heads, the shard has 1"):
        choose_by_head(shard_of(x, x, block_size=8), budgets, scale=1.0, collectives=ALONE)
