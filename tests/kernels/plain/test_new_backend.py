"""A backend of one's own, written in one file, beside the reference: through the entry points that all share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from kernel_cases import CASES, assert_exact, load_case
from new_backend import DenseMask
from shard_cases import NAMES, Problem, by_shards, expected, plain_problem, problems
from sparsering.kernels import api
from sparsering.kernels.backend import Backend, register
from sparsering.kernels.mask import AttentionMask

BACKEND = DenseMask.name


@given(problem=problems())
@settings(max_examples=30)
def test_shards_of_any_placement_make_the_whole(problem: Problem) -> None:
    """Documents, columns, rows with nothing to attend, grouped heads."""
    for name, actual, wanted in zip(NAMES, by_shards(problem, backend=BACKEND), expected(problem), strict=True):
        assert not actual.isnan().any(), name
        assert_exact(actual, wanted, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_full_attention_agrees_with_the_worked_case(name: str) -> None:
    case = load_case(name)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = api.full_attention(q, k, v, case.mask, scale=case.scale, backend=BACKEND)
    grads = torch.autograd.grad(out, (q, k, v), case.grad_out)
    for key, value in zip(NAMES, (out.detach(), lse, *grads), strict=True):
        assert_exact(value, case.expected[key], atol=1e-8)


def test_a_wrong_mask_fails() -> None:
    problem = plain_problem()
    mask = dataclasses.replace(problem.mask, columns=None)
    wrong = by_shards(dataclasses.replace(problem, mask=mask), backend=BACKEND)
    for actual, wanted in zip(wrong, expected(problem), strict=True):
        with pytest.raises(AssertionError):
            assert_exact(actual, wanted, atol=1e-8)


def test_sums_are_begun_and_rounded_around_it() -> None:
    """The base class begins accumulators that hold nothing (here NaN) and ends them in 16 bits."""
    problem = plain_problem(dtype=torch.float16)
    q, k, v = problem.q, problem.k, problem.v
    whole = api.WholeAttention.of(problem.mask, q.shape[1], device=q.device, backend=BACKEND)
    queries = api.Queries(q=q, scale=problem.scale)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    try:
        out, lse = whole.forward(queries, k, v)
        grads = whole.backward(queries, k, v, (out, lse), problem.grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, actual, wanted in zip(NAMES, (out, lse, *grads), expected(problem), strict=True):
        assert actual.dtype == (torch.float32 if name == "lse" else torch.float16)
        torch.testing.assert_close(actual.double(), wanted, atol=2e-2, rtol=1e-2)


def test_it_is_known_by_its_name_which_nobody_else_takes() -> None:
    assert BACKEND in api.backend_names() and isinstance(api.backend_of(BACKEND), DenseMask)

    class Other(Backend):
        name = BACKEND

    register(DenseMask())  # again, as when a module is loaded twice
    with pytest.raises(ValueError, match="'dense-mask' is registered already, as DenseMask"):
        register(Other())
    mask = AttentionMask(seq_len_tokens=4, block_size=2, active=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"backend: 'cuda' is not one of reference, blockwise, .*dense-mask"):
        api.block_index(mask, torch.arange(4), torch.arange(4), backend="cuda")
