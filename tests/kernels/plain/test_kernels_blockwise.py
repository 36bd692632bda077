"""The blockwise backend, and the entry points that all backends share, against the float64 reference on shards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

import kernel_calls as calls
from kernel_cases import CASES, assert_exact, load_case
from shard_cases import NAMES, Problem, by_shards, expected, plain_problem, problems, sum_over_shards
from sparsering.kernels import api, gathered
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.plain.reference import reference_attention


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("name", CASES)
def test_full_attention_agrees_with_the_worked_case(name, backend):
    case = load_case(name)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = api.full_attention(q, k, v, case.mask, scale=case.scale, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), case.grad_out)
    for key, value in zip(NAMES, (out.detach(), lse, *grads), strict=True):
        assert_exact(value, case.expected[key])


@given(problem=problems())
@settings(max_examples=60)
def test_shards_of_any_placement_make_the_whole(problem):
    for name, actual, wanted in zip(NAMES, by_shards(problem, backend="blockwise"), expected(problem), strict=True):
        assert not actual.isnan().any(), name
        assert_exact(actual, wanted)


@given(problem=problems())
@settings(max_examples=10)
def test_the_reference_itself_works_by_shards(problem):
    for actual, wanted in zip(by_shards(problem, backend="reference"), expected(problem), strict=True):
        assert_exact(actual, wanted)


def _mutations(mask: AttentionMask) -> dict[str, AttentionMask]:
    assert mask.columns is not None
    active, columns = mask.active.clone(), mask.columns.clone()
    active[1, 3] = False
    columns[0] = (columns[0] + 1).clamp(max=mask.seq_len_tokens)
    return {
        "a diagonal is lost": dataclasses.replace(mask, active=active),
        "the columns are one token off": dataclasses.replace(mask, columns=columns),
        "the columns are lost": dataclasses.replace(mask, columns=None),
        "heads are swapped": dataclasses.replace(mask, active=mask.active.flip(0)),
        "the length is one token short": dataclasses.replace(mask, seq_len_tokens=mask.seq_len_tokens - 1),
    }


@pytest.mark.parametrize("mutation", _mutations(plain_problem().mask))
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_index_fails(mutation, name):
    problem = plain_problem()
    wrong = dataclasses.replace(problem, mask=_mutations(problem.mask)[mutation])
    at = NAMES.index(name)
    actual, wanted = by_shards(wrong, backend="blockwise")[at], expected(problem)[at]
    with pytest.raises(AssertionError):
        assert_exact(actual, wanted)


def test_an_index_of_another_key_shard_fails():
    problem = plain_problem(columns=0)
    mine, theirs = problem.shards
    tensors = problem.q[:, mine], problem.k[:, theirs], problem.v[:, theirs]
    wanted, _ = reference_attention(*tensors, problem.mask, scale=1.0, q_positions=mine, k_positions=theirs)
    for positions, same in ((theirs, True), (mine, False)):
        index = api.block_index(problem.mask, mine, positions, backend="blockwise")
        out, _ = calls.block_forward(*tensors, index, scale=1.0)
        assert torch.allclose(out, wanted, rtol=0, atol=1e-10) is same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_within_twice_that_of_plain_torch(dtype):
    problem = plain_problem(dtype=dtype)
    exact = expected(problem)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    q, k, v = leaves
    out, lse = api.full_attention(q, k, v, problem.mask, scale=problem.scale, backend="blockwise")
    ours = (out.detach(), lse, *torch.autograd.grad(out, leaves, problem.grad_out))
    for name, actual, plain, wanted in zip(NAMES, ours, _plain_torch(problem), exact, strict=True):
        valid = wanted.isfinite()
        error, allowed = ((x.double()[valid] - wanted[valid]).abs().max() for x in (actual, plain))
        assert error <= 2 * allowed, (name, float(error), float(allowed))
        if name != "lse":
            assert actual.dtype == dtype


def _plain_torch(problem: Problem) -> tuple[torch.Tensor, ...]:
    """out, lse and gradients by ordinary torch operations in the tensors' own dtype."""
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    group = problem.q.shape[2] // problem.k.shape[2]
    q, k, v = leaves[0], *(x.repeat_interleave(group, dim=2) for x in leaves[1:])
    at = torch.arange(q.shape[1])
    pairs = torch.stack([whole(problem.mask, head, at, at) for head in range(q.shape[2])])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.scale
    scores = scores.masked_fill(~pairs, -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(~pairs, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return (out.detach(), torch.logsumexp(scores, -1).detach(), *torch.autograd.grad(out, leaves, problem.grad_out))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_nan_in_padding_and_odd_strides_do_no_harm(backend):
    problem = plain_problem()
    poisoned = {}
    for name in ("q", "k", "v", "grad_out"):
        x = getattr(problem, name).clone()
        x[:, problem.mask.seq_len_tokens :] = torch.nan
        # Strides as of a fused projection cut into heads, then permuted.
        poisoned[name] = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        assert not poisoned[name].is_contiguous()
    poisoned = dataclasses.replace(problem, **poisoned)
    for name, actual, wanted in zip(NAMES, by_shards(poisoned, backend=backend), expected(problem), strict=True):
        if name != "lse":
            assert not actual[:, problem.mask.seq_len_tokens :].any(), f"{name}: padding rows must be exactly 0"
        assert_exact(actual, wanted)


def test_inactive_tiles_are_never_read():
    problem = plain_problem(columns=0)
    active = torch.zeros_like(problem.mask.active)
    active[:, :2] = True
    mask = dataclasses.replace(problem.mask, active=active)
    index = api.block_index(mask, torch.arange(128, 192), torch.arange(256), backend="blockwise")
    k, v = problem.k.clone(), problem.v.clone()
    unread = torch.arange(256) // 16 < 7
    k[:, unread], v[:, unread] = torch.nan, torch.nan
    out, _ = calls.block_forward(problem.q[:, 128:192], k, v, index, scale=0.25)
    wanted, _ = reference_attention(
        problem.q[:, 128:192], problem.k, problem.v, mask, scale=0.25, q_positions=torch.arange(128, 192)
    )
    assert_exact(out, wanted)


def test_scatter_is_the_transpose_of_gather():
    problem = plain_problem()
    generator = torch.Generator().manual_seed(5)
    for own in problem.shards:
        columns = gathered.gather_columns(problem.k[:, own], problem.mask, own)
        weights = torch.randn(columns.shape, generator=generator, dtype=torch.float64)
        grad = torch.zeros_like(problem.k[:, own])
        gathered.scatter_columns(weights, problem.mask, own, grad=grad)
        assert_exact((columns * weights).sum(), (problem.k[:, own] * grad).sum())
        assert grad.any()


def test_gathered_columns_of_all_ranks_are_the_rows_themselves():
    problem = plain_problem()
    assert problem.mask.columns is not None
    columns = sum_over_shards(problem.k, problem)
    for head in range(4):
        positions = problem.mask.columns[head]
        filled = positions < problem.mask.seq_len_tokens
        assert torch.equal(columns[0, head, filled], problem.k[0, positions[filled].long(), head // 2])
        assert not columns[0, head, ~filled].any()


def test_backward_adds_to_what_is_there():
    problem = plain_problem(columns=0)
    at = torch.arange(256)
    index = api.block_index(problem.mask, at, at, backend="blockwise")
    out, lse, dq, dk, dv = expected(problem)
    delta = (problem.grad_out * out).sum(-1).transpose(1, 2)
    grads = [torch.full_like(x, 2.0) for x in (dq, dk, dv)]
    calls.block_backward(
        problem.grad_out,
        problem.q,
        problem.k,
        problem.v,
        lse,
        delta,
        index,
        scale=problem.scale,
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
    )
    for actual, wanted in zip(grads, (dq, dk, dv), strict=True):
        assert_exact(actual, wanted + 2.0)


def test_positions_that_do_not_ascend_are_refused():
    mask = plain_problem().mask
    with pytest.raises(ValueError, match="k_positions: 1 follows 2"):
        api.block_index(mask, torch.arange(4), torch.tensor([0, 2, 1]), backend="blockwise")


def test_an_empty_shard_is_fine():
    problem = plain_problem()
    none = torch.arange(0)
    index = api.block_index(problem.mask, torch.arange(256), none, backend="blockwise")
    out, lse = calls.block_forward(problem.q, problem.k[:, :0], problem.v[:, :0], index, scale=1.0)
    assert not out.any() and torch.all(lse == -torch.inf)
    assert not gathered.gather_columns(problem.k[:, :0], problem.mask, none).any()


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_gradients_of_gradients_are_refused(backend: str) -> None:
    q, k, v = (torch.randn(1, 32, 1, 16, requires_grad=True) for _ in range(3))
    mask = AttentionMask(seq_len_tokens=32, block_size=16, active=torch.ones(1, 2, dtype=torch.bool), columns=None)
    out, _ = api.full_attention(q, k, v, mask, scale=0.25, backend=backend)
    with pytest.raises(ValueError, match="create_graph: gradients of gradients"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    torch.autograd.grad(out.sum(), q)
