"""Random problems cut into shards of any placement, and attention computed shard by shard, as a ring would."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

import kernel_calls as calls
from sparsering.kernels import api, gathered
from sparsering.kernels.mask import AttentionMask
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
        call: dict[str, Any] = {"scale": p.scale}
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
    own = [gathered.gather_columns(x[:, rows], problem.mask, rows) for rows in problem.shards]
    return torch.stack(own).sum(0).to(x.dtype)


def plain_problem(*, dtype: torch.dtype = torch.float64, columns: int = 9, documents: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(3)
    mask = make_mask(
        generator, seq_len=250, block_size=16, heads=4, toeplitz=True, columns=columns, documents=documents
    )
    mask.active[:, 0] = True
    mask.active[1, 3] = True
    shards = make_shards(generator, ranks=2, granularity=16, granules=8, placement="striped")
    return make_problem(generator, mask=mask, shards=shards, kv_heads=2, batch=1, dim=16, dtype=dtype)
