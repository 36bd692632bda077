"""What launches read and write in turn: out and lse that go on from earlier partials, gradients that are summed up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..jit import run
from ..merge import accumulator_dtype
from ..values import Columns, KeyGradients, Keys, Partial, Queries, QueryGradient
from . import tuning
from .forward import forward_kernel
from .launching import loadable, query_launch, scale_of, source
from .views import Rows, Strides

ACCUMULATOR_DTYPES = (torch.float32, torch.float64)


def write_partial(
    queries: Queries, keys: Keys | None, columns: Columns | None, earlier: Partial | None, out_dtype: torch.dtype | None
) -> Partial:
    """Launch the forward of the block part, the column part, or both; out_dtype: default the accumulator's."""
    q, (launch, grid, given) = queries.q, query_launch(tuning.FORWARDS, queries.q, keys, columns)
    # With pointers to both dtypes, the registers of a merge without tensor descriptors would spill.
    pointers = q.is_cuda and not launch.tma
    if pointers and earlier is not None and out_dtype == q.dtype != earlier[0].dtype:
        out, lse = write_partial(queries, keys, columns, earlier, None)
        return out.to(q.dtype), lse
    (out, lse), prior = _next_partial(q, earlier, out_dtype)
    given["at"] = given["at"]._replace(out=Strides.of(out))
    if grid[0]:
        tokens = q.shape[1]
        run(
            forward_kernel,
            grid,
            out=source(out, tokens, launch.m, launch),
            prior=None if prior is None else source(prior, tokens, launch.m, launch),
            lse=Rows.of(lse),
            scale=scale_of(queries),
            q_tokens=tokens,
            **given,
        )
    return out, lse


def _next_partial(q: Tensor, earlier: Partial | None, out_dtype: torch.dtype | None) -> tuple[Partial, Tensor | None]:
    """((out, lse) to be written, the earlier out to go on from or None); lse is merged in place.

    out_dtype: default the accumulator's. An earlier out of that dtype is written in place.
    """
    wanted = out_dtype or accumulator_dtype(q.dtype)
    if earlier is None:
        batch, tokens, heads, _ = q.shape
        lse = torch.empty(batch, heads, tokens, dtype=accumulator_dtype(q.dtype), device=q.device)
        return (torch.empty(q.shape, dtype=wanted, device=q.device), lse), None
    out, lse = earlier
    if out.dtype == wanted:
        return earlier, out
    return (torch.empty_strided(out.shape, out.stride(), dtype=wanted, device=q.device), lse), out


def check_partial(out: Tensor, lse: Tensor, q: Tensor) -> None:
    """Raise ValueError when (out, lse) [B, S, H, D], [B, H, S] cannot be written in place."""
    batch, tokens, heads, _ = q.shape
    if out.shape != q.shape or lse.shape != (batch, heads, tokens):
        raise ValueError(f"earlier: shapes {tuple(out.shape)}, {tuple(lse.shape)} are not those of q {tuple(q.shape)}")
    if loadable(out) is not out or lse.stride(-1) != 1:
        raise ValueError(
            f"earlier: strides {out.stride()}, {lse.stride()} do not keep rows in one piece, 16-byte aligned"
        )


@contextmanager
def query_gradient(into: QueryGradient) -> Iterator[QueryGradient]:
    """What a launch writes of `into`. A total that the kernels cannot write is copied, and written back."""
    if into.final is None:
        with accumulators(into.total) as (total,):
            yield replace(into, total=total)
        return
    if loadable(into.total) is not into.total or loadable(into.final) is not into.final:
        raise ValueError("grad_q, final_q: rows of D elements are not in one piece, 16-byte aligned")
    yield into


@contextmanager
def key_gradients(into: KeyGradients) -> Iterator[KeyGradients]:
    """`accumulators` of dK and dV; or themselves, where one launch writes them rounded. ValueError if it cannot."""
    if into.add or into.k.dtype in ACCUMULATOR_DTYPES:
        with accumulators(into.k, into.v) as (grad_k, grad_v):
            yield replace(into, k=grad_k, v=grad_v)
        return
    if any(loadable(grad) is not grad for grad in (into.k, into.v)):
        raise ValueError("grad_k, grad_v: rows of D elements are not in one piece, 16-byte aligned")
    yield into


@contextmanager
def accumulators(*grads: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The given accumulators, or aligned copies of them that are written back at the end."""
    used = tuple(loadable(grad) for grad in grads)
    yield used
    for grad, copy in zip(grads, used, strict=True):
        if copy is not grad:
            grad.copy_(copy)
