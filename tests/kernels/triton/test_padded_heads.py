"""Heads that the Triton kernels compute padded, in the interpreter and on a GPU, against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernel_calls as calls
from padded_cases import (
    BETWEEN,
    SCALE,
    Drawn,
    assert_same,
    at_once,
    by_tasks,
    check_in_sixteen_bits,
    reference,
)
from rank_pool import RankPool
from ring_cases import PATTERNS, Case, expected, make_case_plan
from sparsering.kernels import api
from sparsering.kernels.plain.reference import reference_attention
from sparsering.kernels.tools import accuracy
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.ulysses import Ulysses

pytest.importorskip("triton")
from sparsering.kernels.triton import launching

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch.empty gives holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty((2, 3), dtype=torch.float16).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


KINDS: dict[str, dict[str, Any]] = {
    "toeplitz, ragged": {},
    "block mask": {"toeplitz": False, "tokens": 128, "padding": 0},
    "documents, blocks alone": {"documents": True, "columns": 0},
    "float32, batch of 2, 4:1": {"dtype": torch.float32, "batch": 2, "heads": (4, 1), "tokens": 90, "padding": 6},
}


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [80, 96])
def test_padded_heads_agree_with_the_definition(head_dim: int, kind: str) -> None:
    case = Drawn(head_dim=head_dim, **KINDS[kind])
    tensors, mask = case.make()
    tolerance = 1e-10 if case.dtype == torch.float64 else 2e-5
    assert_same(at_once(tensors, mask), reference(tensors, mask), case.tokens, tolerance)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim", [dim for dim in BETWEEN if dim < 128 and dim not in (80, 96)] + [136, 192, 264])
def test_every_multiple_of_eight_is_padded(head_dim: int) -> None:
    tensors, mask = Drawn(head_dim=head_dim, tokens=60, padding=4, heads=(2, 1), columns=9).make()
    assert_same(at_once(tensors, mask), reference(tensors, mask), 60, 1e-10)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "apart"),
    [(80, torch.float64, True), (96, torch.float64, False), (80, torch.float32, False), (96, torch.float32, True)],
)
def test_padded_heads_task_by_task(head_dim: int, dtype: torch.dtype, apart: bool) -> None:
    tensors, mask = Drawn(head_dim=head_dim, dtype=dtype, toeplitz=dtype == torch.float64).make()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_same(by_tasks(tensors, mask, apart=apart), reference(tensors, mask), 150, tolerance)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["toeplitz, ragged", "block mask"])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_wide_heads_agree_with_the_definition(head_dim: int, kind: str) -> None:
    """What the kernels compute as it is; launches of their own (tuning.WIDE)."""
    tensors, mask = replace(Drawn(head_dim=head_dim, **KINDS[kind]), heads=(2, 1)).make()
    assert_same(at_once(tensors, mask), reference(tensors, mask), mask.seq_len_tokens, 1e-10)
    assert_same(by_tasks(tensors, mask, apart=True), reference(tensors, mask), mask.seq_len_tokens, 1e-10)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("head_dim", [80, 96, 192])
def test_padded_heads_in_sixteen_bits(head_dim: int, narrow: bool) -> None:
    """float16: sums in float32, ended in 16 bits; gradients of a task rounded where they are to be sent."""
    check_in_sixteen_bits(Drawn(head_dim=head_dim, dtype=torch.float16), "cpu", narrow=narrow)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_whole_sequences_of_padded_heads() -> None:
    """What one device alone runs: block part and columns in one launch."""
    (grad_out, q, k, v), mask = Drawn(head_dim=96, tokens=100, padding=28).make()
    whole_sequence = api.WholeAttention.of(mask, 128, device=q.device, backend="triton")
    queries = api.Queries(q=q, scale=SCALE)
    out, lse = whole_sequence.forward(queries, k, v)
    grads = whole_sequence.backward(queries, k, v, (out, lse), grad_out)
    assert_same([out, lse, *grads], reference([grad_out, q, k, v], mask), 100, 1e-10)


@interpreted
def test_earlier_partials_are_merged_where_they_lie() -> None:
    """As without padding: out and lse of the accumulator's dtype are overwritten and come back."""
    (_, q, k, v), mask = Drawn(head_dim=80, tokens=64, padding=0, columns=0).make()
    index = api.block_index(mask, torch.arange(64), torch.arange(64), backend="triton")
    earlier = torch.zeros_like(q), torch.full((1, 4, 64), -torch.inf, dtype=q.dtype)
    out, lse = calls.block_forward(q, k, v, index, scale=SCALE, into=earlier)
    assert out is earlier[0] and lse is earlier[1]
    torch.testing.assert_close(out, reference_attention(q, k, v, mask, scale=SCALE)[0], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="earlier: shapes"):
        calls.block_forward(q, k, v, index, scale=SCALE, into=(earlier[0][..., :64], earlier[1]))


@interpreted
@pytest.mark.parametrize("head_dim", [520, 576, 100])
def test_larger_heads_are_refused_by_the_kernels_too(head_dim: int) -> None:
    (_, q, k, v), mask = Drawn(head_dim=head_dim, tokens=64, padding=0, columns=0).make()
    index = api.block_index(mask, torch.arange(64), torch.arange(64), backend="triton")
    with pytest.raises(
        ValueError, match=f"^q: head dim {head_dim} is not one of .*, nor another multiple of 8 below 512"
    ):
        calls.block_forward(q, k, v, index, scale=SCALE)


@interpreted
@pytest.mark.parametrize("layout", [Gather(chunks=1), Ring(), Ulysses(degree=2)])
def test_ranks_with_padded_heads(layout: Layout, rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout=layout,
                pattern="gqa")  # fmt: skip
    plan = make_case_plan(case, backend="triton", dtype="float32", head_dim=80)
    results = rank_pools(2).run("attention", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=7)
    placed = plan.make_placement()
    wanted = expected("gqa", placed.padded_tokens, seed=7, head_dim=80)
    for rank, result in enumerate(results):
        rows = placed.positions(rank)
        for name in ("out", "dq", "dk", "dv"):
            assert abs(result[name] - wanted[name][:, rows]).max() <= 1e-4, (rank, name)


def padded_cases() -> list[accuracy.Case]:
    return [case for case in accuracy.cases() if case.head_dim not in launching.HEAD_DIMS]


def test_doctor_checks_padded_heads() -> None:
    assert {case.head_dim for case in padded_cases()} == {80, 96, 192}


@pytest.mark.gpu
@pytest.mark.parametrize("case", padded_cases(), ids=str)
def test_errors_on_a_gpu(case: accuracy.Case) -> None:
    ratios = accuracy.error_ratios(case, "triton", torch.device("cuda"))
    assert all(ratio <= accuracy.ALLOWED_RATIO for ratio in ratios.values()), ratios


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [80, 96, 24, 120, 192, 256, 512])
def test_errors_task_by_task_on_a_gpu(head_dim: int, dtype: torch.dtype, narrow: bool) -> None:
    case = Drawn(head_dim=head_dim, dtype=dtype, tokens=1000, padding=24, block=128, heads=(16, 2), columns=70)
    check_in_sixteen_bits(case, "cuda", narrow=narrow)
