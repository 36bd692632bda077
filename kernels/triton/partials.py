"""What launches read and write in turn: out and lse that go on from earlier partials, gradients that are summed up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..merge import accumulator_dtype
from . import tuning
from .launching import Partial, loadable

ACCUMULATOR_DTYPES = (torch.float32, torch.float64)


def empty_partial(q: Tensor, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse [B, H, S]) to be written; the accumulator's dtype unless out_dtype says otherwise."""
    accumulator = accumulator_dtype(q.dtype)
    batch, tokens, heads, _ = q.shape
    lse = torch.empty(batch, heads, tokens, dtype=accumulator, device=q.device)
    return torch.empty(q.shape, dtype=out_dtype or accumulator, device=q.device), lse


def next_partial(
    q: Tensor, into: Partial | None, out_dtype: torch.dtype | None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """((out, lse) to be written, the earlier out to go on from or None); lse is merged in place.

    out_dtype: default the accumulator's. An earlier out of that dtype is written in place.
    """
    if into is None:
        return empty_partial(q, out_dtype), None
    earlier, lse = into
    wanted = out_dtype or accumulator_dtype(q.dtype)
    if earlier.dtype == wanted:
        return into, earlier
    out = torch.empty_strided(earlier.shape, earlier.stride(), dtype=wanted, device=q.device)
    return (out, lse), earlier


def narrows_after(launch: tuning.Launch, q: Tensor, into: Partial | None, out_dtype: torch.dtype | None) -> bool:
    """Whether a merge writes the accumulator's dtype first: with pointers to both dtypes its registers would spill."""
    return q.is_cuda and not launch.tma and into is not None and out_dtype == q.dtype != into[0].dtype


def check_partial(out: Tensor, lse: Tensor, q: Tensor) -> None:
    """Raise ValueError when (out, lse) [B, S, H, D], [B, H, S] cannot be written in place."""
    batch, tokens, heads, _ = q.shape
    if out.shape != q.shape or lse.shape != (batch, heads, tokens):
        raise ValueError(f"into: shapes {tuple(out.shape)}, {tuple(lse.shape)} are not those of q {tuple(q.shape)}")
    if loadable(out) is not out or lse.stride(-1) != 1:
        raise ValueError(f"into: strides {out.stride()}, {lse.stride()} do not keep rows in one piece, 16-byte aligned")


@dataclass(frozen=True, kw_only=True)
class QueryGradient:
    """Where a launch's dQ goes: into `total`, or where it is the last one, with what is there into `final`.

    total [B, S_q, H, D] in the accumulator's dtype, holding earlier launches' sum where `add`; final: the same shape
    and strides, in q's dtype.
    """

    total: Tensor
    add: bool
    final: Tensor | None = None

    def __post_init__(self) -> None:
        if self.total.dtype not in ACCUMULATOR_DTYPES:
            raise ValueError(f"gradient accumulator: dtype {self.total.dtype} is neither float32 nor float64")
        if self.final is not None and (self.final.shape, self.final.stride()) != (
            self.total.shape,
            self.total.stride(),
        ):
            raise ValueError(
                f"final_q: shape {tuple(self.final.shape)}, strides {self.final.stride()} are not those of grad_q"
            )

    @property
    def target(self) -> Tensor:
        """What the launch writes."""
        return self.total if self.final is None else self.final

    def finish_rows(self, valid_tokens: int) -> None:
        """Write the rows from valid_tokens on, which no launch writes."""
        rest = self.target[:, valid_tokens:]
        if not rest.shape[1]:
            return
        if not self.add:
            rest.zero_()
        elif self.final is not None:
            rest.copy_(self.total[:, valid_tokens:])

    def take(self, fresh: Tensor) -> None:
        """Write what a launch computed apart [B, S_q, H, D], in the accumulator's dtype, all rows: rounded once."""
        if self.add:
            torch.add(self.total, fresh, out=self.target)
        else:
            self.target.copy_(fresh)

    @contextmanager
    def launched(self) -> Iterator[dict[str, Any]]:
        """Arguments of gradients.grad_query. A total that the kernels cannot write is copied, and written back."""
        if self.final is not None:
            if loadable(self.total) is not self.total or loadable(self.final) is not self.final:
                raise ValueError("grad_q, final_q: rows of D elements are not in one piece, 16-byte aligned")
            yield {"grad_q": self.final, "prior": self.total if self.add else None, "add": False}
            return
        with accumulators(self.total) as (total,):
            yield {"grad_q": total, "prior": None, "add": self.add}


@contextmanager
def key_gradients(grad_k: Tensor, grad_v: Tensor, *, add: bool) -> Iterator[tuple[Tensor, ...]]:
    """`accumulators` of dK and dV; or themselves, where one launch writes them rounded. ValueError if it cannot."""
    if add or grad_k.dtype in ACCUMULATOR_DTYPES:
        with accumulators(grad_k, grad_v) as used:
            yield used
        return
    if any(loadable(grad) is not grad for grad in (grad_k, grad_v)):
        raise ValueError("grad_k, grad_v: rows of D elements are not in one piece, 16-byte aligned")
    yield grad_k, grad_v


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
