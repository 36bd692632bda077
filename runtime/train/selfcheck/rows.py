"""Attention of a few sampled rows by its definition, in float64, spread over ranks: no key or value travels.

Every rank attends the sampled queries over its own keys, by the *pattern* and not by any index made of it, and the
parts are added up by reductions of a few kilobytes. Beside each result stands how far rounding may take it: the sum of
the magnitudes that were added, times the precision of the type that carried them.

Shape legend: R sampled rows, n tokens of this rank's shard, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# How many roundings of a sum's terms are allowed for. Two are usual: of the weights and of the result.
ROUNDINGS = 8.0
Reduce = Callable[[Tensor], Tensor]


class SomeKeys(NamedTuple):
    """Some of this rank's keys and values, float64 [n, D], and which sampled queries attend them, bool [R, n]."""

    k: Tensor
    v: Tensor
    allowed: Tensor


Keys = Callable[[], Iterable[SomeKeys]]  # all of this rank's, a part at a time: float64 takes four times the memory


@dataclass(frozen=True, kw_only=True)
class Reductions:
    """Over all ranks; each may overwrite what it is given."""

    add: Reduce
    largest: Reduce


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounded:
    """What a result should be, and how far from it rounding may leave it; of one shape, float64."""

    value: Tensor
    bound: Tensor

    def excess(self, found: Tensor) -> Tensor:
        """Return the largest error over its bound (1.0: just allowed), infinite where something is not a number."""
        found = found.double()
        same = found == self.value  # also where both are minus infinity
        error = torch.where(same, torch.zeros_like(found), (found - self.value).abs())
        ratio = torch.where(error == 0, torch.zeros_like(error), error / self.bound)
        return ratio.nan_to_num(nan=torch.inf).max() if ratio.numel() else ratio.new_zeros(())

    def rows(self, places: Tensor) -> Bounded:
        """Return some of the rows."""
        return Bounded(value=self.value[places], bound=self.bound[places])


@dataclass(frozen=True, kw_only=True)
class Precision:
    """carried: of the type of inputs and outputs; summed: of the type in which sums are kept."""

    carried: float
    summed: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """Return that of attention over inputs of this type."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(carried=torch.finfo(dtype).eps, summed=torch.finfo(wide).eps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """How scores are made, and weights of them: see `kernels.values.Queries`. sink: a learned logit, float64, or None.

    Of a rounding in a product, a softcap passes on no more than it is given: bounds are those without.
    """

    scale: float
    softcap: float | None = None
    sink: Tensor | None = None

    def scores(self, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        """Return the scores [R, n] of queries [R, D] on keys [n, D], minus infinity where not allowed."""
        scores = (q @ k.T) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores.masked_fill_(~allowed, -torch.inf)

    def slopes(self, scores: Tensor) -> Tensor | float:
        """Return by how much a softcap flattens scores: the gradient of each in the product that it is made of."""
        if self.softcap is None:
            return 1.0
        return 1 - (scores.nan_to_num(neginf=0.0) / self.softcap) ** 2


@dataclass(frozen=True, kw_only=True, eq=False)
class AttendedRows:
    """Sampled queries after forward. q [R, D]; out and lse as they should be; sizes [R]: the largest |q| |k| summed."""

    q: Tensor
    out: Bounded
    lse: Bounded
    sizes: Tensor


def attend_rows(q: Tensor, keys: Keys, *, scoring: Scoring, precision: Precision, over: Reductions) -> AttendedRows:
    """Return out [R, D] and lse [R] of queries over the keys of all ranks. Collective.

    q: float64 [R, D], equal on all ranks; keys: this rank's, read twice.
    """
    tops = torch.stack([q.new_full(q.shape[:1], -torch.inf), q.new_zeros(q.shape[:1])], dim=1)
    for some in keys():
        sizes = ((q.abs() @ some.k.abs().T) * scoring.scale).masked_fill_(~some.allowed, 0.0)
        tops = tops.maximum(torch.stack([scoring.scores(q, some.k, some.allowed).amax(1), sizes.amax(1)], dim=1))
    tops = over.largest(tops)
    top, sizes, dim = tops[:, 0], tops[:, 1], q.shape[1]
    sums = q.new_zeros(q.shape[0], 1 + 2 * dim)
    for some in keys():
        share = torch.exp(scoring.scores(q, some.k, some.allowed) - top.nan_to_num(neginf=0.0)[:, None])
        sums += torch.cat([share.sum(1, keepdim=True), share @ some.v, share @ some.v.abs()], dim=1)
    sums = over.add(sums)
    total = sums[:, :1]
    if scoring.sink is not None:
        total = torch.where(total > 0, total + torch.exp(scoring.sink - top.nan_to_num(neginf=0.0))[:, None], total)
    weight = torch.where(total > 0, 1 / total, 0.0)
    slack = precision.carried + precision.summed * (1 + sizes[:, None])
    out = Bounded(value=sums[:, 1 : 1 + dim] * weight, bound=ROUNDINGS * slack * sums[:, 1 + dim :] * weight)
    lse = top + total[:, 0].log()
    lse_bound = ROUNDINGS * precision.summed * (1 + sizes + lse.abs().nan_to_num(posinf=0.0))
    return AttendedRows(q=q, out=out, lse=Bounded(value=lse, bound=lse_bound), sizes=sizes)


def query_gradients(
    rows: AttendedRows, grad_out: Tensor, keys: Keys, *, scoring: Scoring, precision: Precision, over: Reductions
) -> Bounded:
    """Return dq [R, D] of the sampled queries. Collective. grad_out float64 [R, D]; the rest as in `attend_rows`."""
    lse = rows.lse.value.nan_to_num(neginf=0.0)[:, None]
    delta = (grad_out * rows.out.value).sum(1, keepdim=True)
    delta_size = (grad_out * rows.out.value).abs().sum(1, keepdim=True)
    parts = rows.q.new_zeros(rows.q.shape[0], 3 * rows.q.shape[1])
    for some in keys():
        k, sizes = some.k, grad_out.abs() @ some.v.abs().T
        scores = scoring.scores(rows.q, k, some.allowed)
        share = torch.exp(scores - lse)
        grad_scores = share * (grad_out @ some.v.T - delta) * scoring.slopes(scores)
        carried, summed = grad_scores.abs() + share * delta_size, share * (sizes + delta_size)
        parts += torch.cat([grad_scores @ k, carried @ k.abs(), summed @ k.abs()], dim=1)
    value, carried, summed = over.add(parts).mul_(scoring.scale).chunk(3, dim=1)
    slack = precision.summed * (1 + rows.sizes[:, None])
    return Bounded(value=value, bound=ROUNDINGS * (precision.carried * carried + slack * summed))


@dataclass(frozen=True, kw_only=True, eq=False)
class SomeQueries:
    """Some queries of one head on this rank, float64: q, grad_out [n, D], lse, delta and delta_size [n]."""

    q: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor
    delta_size: Tensor


class KeyRows:
    """dk and dv of sampled keys, head by head: each rank adds what its own queries give."""

    def __init__(self, k: Tensor, v: Tensor, *, scoring: Scoring, precision: Precision) -> None:
        """k, v: float64 [R, D], equal on all ranks."""
        self._k, self._v, self._scoring, self._precision = k, v, scoring, precision
        self._parts = k.new_zeros(k.shape[0], 6 * k.shape[1])

    def add(self, some: SomeQueries, allowed: Tensor) -> None:
        """Add some of this rank's queries. allowed: bool [n, R]."""
        scores = self._scoring.scores(some.q, self._k, allowed)
        share = torch.exp(scores - some.lse.nan_to_num(neginf=0.0)[:, None])
        grad_share = some.grad_out @ self._v.T
        grad_scores = share * (grad_share - some.delta[:, None]) * self._scoring.slopes(scores)
        by_delta = share * some.delta_size[:, None]
        sizes = share * (some.grad_out.abs() @ self._v.abs().T) + by_delta
        reach = 1 + (some.q.abs() @ self._k.abs().T).masked_fill(~allowed, 0.0) * self._scoring.scale
        q, grad_out = some.q.abs(), some.grad_out.abs()
        self._parts += torch.cat([
            grad_scores.T @ some.q, (grad_scores.abs() + by_delta).T @ q, (sizes * reach).T @ q,
            share.T @ some.grad_out, share.T @ grad_out, (share * reach).T @ grad_out,
        ], dim=1)  # fmt: skip

    def finish(self, over: Reductions) -> tuple[Bounded, Bounded]:
        """Return (dk, dv) [R, D] of all ranks' queries. Collective."""
        parts = over.add(self._parts).chunk(6, dim=1)
        dk, dv = [part * self._scoring.scale for part in parts[:3]], parts[3:]
        return self._bounded(*dk), self._bounded(*dv)

    def _bounded(self, value: Tensor, carried: Tensor, summed: Tensor) -> Bounded:
        bound = self._precision.carried * carried + self._precision.summed * summed
        return Bounded(value=value, bound=ROUNDINGS * bound)
