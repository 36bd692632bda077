"""What launches read and write in turn: out and lse that go on from earlier partials, gradients that are summed up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..jit import run
from ..merge import accumulator_dtype
from ..values import Columns, KeyGradients, Keys, Partial, Queries, QueryGradient
from . import tuning
from .forward import forward_kernel
from .launching import BASE_2, QueryLaunch, loadable, source
from .views import Rows, Strides

ACCUMULATOR_DTYPES = (torch.float32, torch.float64)


def write_partial(
    queries: Queries, keys: Keys | None, columns: Columns | None, earlier: Partial | None, out_dtype: torch.dtype | None
) -> Partial:
    """Launch the forward of the block part, the column part, or both; out_dtype: default the accumulator's."""
    q, made = queries.q, QueryLaunch.of(tuning.FORWARDS, queries.q, keys, columns)
    if narrows_after(made.launch, q, earlier, out_dtype):
        out, lse = write_partial(queries, keys, columns, earlier, None)
        return out.to(q.dtype), lse
    (out, lse), prior = next_partial(q, earlier, out_dtype)
    if made.grid[0]:
        launch, tokens = made.launch, q.shape[1]
        run(
            forward_kernel,
            made.grid,
            out=source(out, tokens, launch.m, launch),
            prior=None if prior is None else source(prior, tokens, launch.m, launch),
            lse=Rows.of(lse),
            at=made.at._replace(out=Strides.of(out)),
            scale_log2=queries.scale * BASE_2,
            q_tokens=tokens,
            **made.given,
        )
    return out, lse


def next_partial(q: Tensor, earlier: Partial | None, out_dtype: torch.dtype | None) -> tuple[Partial, Tensor | None]:
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


def narrows_after(launch: tuning.Launch, q: Tensor, earlier: Partial | None, out_dtype: torch.dtype | None) -> bool:
    """Whether a merge writes the accumulator's dtype first: with pointers to both dtypes its registers would spill."""
    return q.is_cuda and not launch.tma and earlier is not None and out_dtype == q.dtype != earlier[0].dtype


def check_partial(out: Tensor, lse: Tensor, q: Tensor) -> None:
    """Raise ValueError when (out, lse) [B, S, H, D], [B, H, S] cannot be written in place."""
    batch, tokens, heads, _ = q.shape
    if out.shape != q.shape or lse.shape != (batch, heads, tokens):
        raise ValueError(f"earlier: shapes {tuple(out.shape)}, {tuple(lse.shape)} are not those of q {tuple(q.shape)}")
    if loadable(out) is not out or lse.stride(-1) != 1:
        raise ValueError(
            f"earlier: strides {out.stride()}, {lse.stride()} do not keep rows in one piece, 16-byte aligned"
        )


@dataclass(frozen=True, kw_only=True)
class QueryTarget:
    """What a dQ launch writes: grad [B, S_q, H, D], with `prior` (of its strides) or, where `add`, with itself."""

    grad: Tensor
    prior: Tensor | None = None
    add: bool = False


@contextmanager
def query_gradient(into: QueryGradient) -> Iterator[QueryTarget]:
    """What a launch writes of `into`. A total that the kernels cannot write is copied, and written back."""
    if into.final is not None:
        if loadable(into.total) is not into.total or loadable(into.final) is not into.final:
            raise ValueError("grad_q, final_q: rows of D elements are not in one piece, 16-byte aligned")
        yield QueryTarget(grad=into.final, prior=into.total if into.add else None)
        return
    with accumulators(into.total) as (total,):
        yield QueryTarget(grad=total, add=into.add)


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
    for grad in grads:
        if grad.dtype not in ACCUMULATOR_DTYPES:
            raise ValueError(f"gradient accumulator: dtype {grad.dtype} is neither float32 nor float64")
    used = tuple(loadable(grad) for grad in grads)
    yield used
    for grad, copy in zip(grads, used, strict=True):
        if copy is not grad:
            grad.copy_(copy)
