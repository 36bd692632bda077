"""The blockwise backend, and the entry points that all backends share, against the float64 reference on shards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_calls as calls
from kernel_cases import CASES, assert_exact, load_case
from sparsering.kernels import api, gathered
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.plain.reference import reference_attention, reference_gradients

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Tensors [B, S, H, D] of a whole sequence (S may exceed the mask's valid tokens) and who owns which token."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    mask: AttentionMask
    shards: list[torch.Tensor]
    scale: float


def make_mask(
    generator: torch.Generator,
    *,
    seq_len: int,
    block_size: int,
    heads: int,
    toeplitz: bool,
    columns: int,
    documents: bool,
) -> AttentionMask:
    """A random mask; some heads may have no active block at all."""
    blocks = -(-seq_len // block_size)
    shape = (heads, blocks) if toeplitz else (heads, blocks, blocks)
    active = torch.rand(shape, generator=generator) < torch.rand(heads, *[1] * (len(shape) - 1), generator=generator)
    slots = None
    if columns:
        slots = torch.full((heads, columns), seq_len, dtype=torch.int32)
        for head in range(heads):
            count = min(int(torch.randint(columns + 1, (), generator=generator)), seq_len)
            slots[head, :count] = torch.randperm(seq_len, generator=generator)[:count].sort().values.int()
    starts = torch.rand(seq_len, generator=generator) < 0.05
    return AttentionMask(
        seq_len_tokens=seq_len,
        block_size=block_size,
        active=active,
        columns=slots,
        documents=starts.cumsum(0).int() if documents else None,
    )


def make_shards(
    generator: torch.Generator, *, ranks: int, granularity: int, granules: int, placement: str
) -> list[torch.Tensor]:
    """Global positions of each rank, ascending, equal counts: ranks * granules * granularity tokens in all."""
    owner = torch.arange(ranks * granules) % ranks
    if placement == "contiguous":
        owner = torch.arange(ranks * granules) // granules
    elif placement == "scattered":
        owner = owner[torch.randperm(ranks * granules, generator=generator)]
    tokens = torch.arange(ranks * granules * granularity)
    return [tokens[owner[tokens // granularity] == rank] for rank in range(ranks)]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    ranks, granules = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    granularity, block_size = draw(st.sampled_from([1, 3, 8, 16])), draw(st.sampled_from([4, 8, 16]))
    placement = draw(st.sampled_from(["contiguous", "striped", "scattered"]))
    shards = make_shards(generator, ranks=ranks, granularity=granularity, granules=granules, placement=placement)
    tokens = ranks * granularity * granules
    kv_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seq_len = tokens - draw(st.integers(0, tokens - 1))
    mask = make_mask(
        generator,
        seq_len=seq_len,
        block_size=block_size,
        heads=kv_heads * group,
        toeplitz=draw(st.booleans()),
        columns=draw(st.sampled_from([0, 1, 7])),
        documents=draw(st.booleans()),
    )
    return make_problem(generator, mask=mask, shards=shards, kv_heads=kv_heads, batch=batch, dim=4)


def make_problem(
    generator: torch.Generator,
    *,
    mask: AttentionMask,
    shards: list[torch.Tensor],
    kv_heads: int,
    batch: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    tokens = sum(shard.shape[0] for shard in shards)
    q, k, v, grad_out = (
        torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (mask.heads, kv_heads, kv_heads, mask.heads)
    )
    return Problem(q=q, k=k, v=v, grad_out=grad_out, mask=mask, shards=shards, scale=dim**-0.5)


def expected(problem: Problem) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv of the reference on the whole sequence."""
    given_tensors = problem.q, problem.k, problem.v, problem.mask
    return (
        *reference_attention(*given_tensors, scale=problem.scale),
        *reference_gradients(problem.grad_out, *given_tensors, scale=problem.scale),
    )


def by_shards(problem: Problem, *, backend: str) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv assembled from what every pretend rank computes, as a ring would."""
    p, acc = problem, api.accumulator_dtype(problem.q.dtype)
    column_k, column_v = (sum_over_shards(x, p) for x in (p.k, p.v))
    out, dq = torch.full(p.q.shape, torch.nan, dtype=acc), torch.full(p.q.shape, torch.nan, dtype=acc)
    lse = torch.full((p.q.shape[0], p.q.shape[2], p.q.shape[1]), torch.nan, dtype=acc)
    dk, dv = torch.zeros(p.k.shape, dtype=acc), torch.zeros(p.k.shape, dtype=acc)
    grad_column_k, grad_column_v = (torch.zeros(column_k.shape, dtype=acc) for _ in range(2))
    for mine in p.shards:
        call = {"scale": p.scale}
        q, grad_out = p.q[:, mine], p.grad_out[:, mine]
        indices = [api.block_index(p.mask, mine, theirs, backend=backend) for theirs in p.shards]
        columns = api.column_index(p.mask, mine, backend=backend)
        partial = calls.column_forward(q, column_k, column_v, columns, **call)
        for theirs, index in zip(p.shards, indices, strict=True):
            partial = calls.block_forward(q, p.k[:, theirs], p.v[:, theirs], index, into=partial, **call)
        delta = (grad_out.to(acc) * partial[0]).sum(-1).transpose(1, 2)
        grad_q = torch.zeros(q.shape, dtype=acc)
        calls.column_backward(
            grad_out,
            q,
            column_k,
            column_v,
            partial[1],
            delta,
            columns,
            grad_q=grad_q,
            grad_column_k=grad_column_k,
            grad_column_v=grad_column_v,
            **call,
        )
        for theirs, index in zip(p.shards, indices, strict=True):
            grad_k, grad_v = dk[:, theirs], dv[:, theirs]
            calls.block_backward(
                grad_out,
                q,
                p.k[:, theirs],
                p.v[:, theirs],
                partial[1],
                delta,
                index,
                grad_q=grad_q,
                grad_k=grad_k,
                grad_v=grad_v,
                **call,
            )
            dk[:, theirs], dv[:, theirs] = grad_k, grad_v
        out[:, mine], lse[:, :, mine], dq[:, mine] = *partial, grad_q
    for grad, grad_columns in ((dk, grad_column_k), (dv, grad_column_v)):
        for mine in p.shards:
            rows = grad[:, mine]
            gathered.scatter_columns(grad_columns, p.mask, mine, grad=rows)
            grad[:, mine] = rows
    return out, lse, dq, dk, dv


def sum_over_shards(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """What an all-reduce of every rank's gathered columns gives."""
    return torch.stack([gathered.gather_columns(x[:, own], problem.mask, own) for own in problem.shards]).sum(0).to(x.dtype)


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


def _plain_problem(*, dtype: torch.dtype = torch.float64, columns: int = 9, documents: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(3)
    mask = make_mask(
        generator, seq_len=250, block_size=16, heads=4, toeplitz=True, columns=columns, documents=documents
    )
    mask.active[:, 0] = True
    mask.active[1, 3] = True
    shards = make_shards(generator, ranks=2, granularity=16, granules=8, placement="striped")
    return make_problem(generator, mask=mask, shards=shards, kv_heads=2, batch=1, dim=16, dtype=dtype)


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


@pytest.mark.parametrize("mutation", _mutations(_plain_problem().mask))
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_index_fails(mutation, name):
    problem = _plain_problem()
    wrong = dataclasses.replace(problem, mask=_mutations(problem.mask)[mutation])
    at = NAMES.index(name)
    actual, wanted = by_shards(wrong, backend="blockwise")[at], expected(problem)[at]
    with pytest.raises(AssertionError):
        assert_exact(actual, wanted)


def test_an_index_of_another_key_shard_fails():
    problem = _plain_problem(columns=0)
    mine, theirs = problem.shards
    tensors = problem.q[:, mine], problem.k[:, theirs], problem.v[:, theirs]
    wanted, _ = reference_attention(*tensors, problem.mask, scale=1.0, q_positions=mine, k_positions=theirs)
    for positions, same in ((theirs, True), (mine, False)):
        index = api.block_index(problem.mask, mine, positions, backend="blockwise")
        out, _ = calls.block_forward(*tensors, index, scale=1.0)
        assert torch.allclose(out, wanted, rtol=0, atol=1e-10) is same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_within_twice_that_of_plain_torch(dtype):
    problem = _plain_problem(dtype=dtype)
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
    problem = _plain_problem()
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
    problem = _plain_problem(columns=0)
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
    problem = _plain_problem()
    generator = torch.Generator().manual_seed(5)
    for own in problem.shards:
        columns = gathered.gather_columns(problem.k[:, own], problem.mask, own)
        weights = torch.randn(columns.shape, generator=generator, dtype=torch.float64)
        grad = torch.zeros_like(problem.k[:, own])
        gathered.scatter_columns(weights, problem.mask, own, grad=grad)
        assert_exact((columns * weights).sum(), (problem.k[:, own] * grad).sum())
        assert grad.any()


def test_gathered_columns_of_all_ranks_are_the_rows_themselves():
    problem = _plain_problem()
    assert problem.mask.columns is not None
    columns = sum_over_shards(problem.k, problem)
    for head in range(4):
        positions = problem.mask.columns[head]
        filled = positions < problem.mask.seq_len_tokens
        assert torch.equal(columns[0, head, filled], problem.k[0, positions[filled].long(), head // 2])
        assert not columns[0, head, ~filled].any()


def test_backward_adds_to_what_is_there():
    problem = _plain_problem(columns=0)
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
    mask = _plain_problem().mask
    with pytest.raises(ValueError, match="k_positions: 1 follows 2"):
        api.block_index(mask, torch.arange(4), torch.tensor([0, 2, 1]), backend="blockwise")


def test_an_empty_shard_is_fine():
    problem = _plain_problem()
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
