"""Verifying a distributed layer against the definition, in float64, each rank its own queries and its own keys.

The tolerance follows from the data: float64 must agree to 1e-8; other types may err at most twice as much as plain
torch (eager attention) errs in the same type on the same inputs, on whichever rank it errs most: the largest error of a
few rows is a matter of luck.

Shape legend: S all tokens (padding included), S_own this rank's, c a chunk of rows, H query heads, H_kv K/V heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.mask import AttentionMask, whole
from ..attention.bound import BoundPlan

FLOAT64_TOLERANCE = 1e-8
ERROR_BUDGET = 2.0
# Scores at once: what a CPU's caches hold, and what keeps a GPU busy.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The largest error of one tensor on one rank, plain torch's on any rank, and whether that is good enough."""

    name: str
    rank: int
    error: float
    plain_error: float | None

    @property
    def tolerance(self) -> float:
        """The largest error that passes."""
        return FLOAT64_TOLERANCE if self.plain_error is None else ERROR_BUDGET * self.plain_error

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def verify(
    bound: BoundPlan, mask: AttentionMask, inputs: dict[str, Tensor], results: dict[str, Tensor], scale: float
) -> list[Verdict]:
    """Check this rank's results of one layer; collective.

    inputs: "q", "k", "v", "grad_out" of the whole sequence [1, S, heads, D] in natural order, in the plan's type;
    results: this rank's "out", "lse", "dq", "dk", "dv" as `PlannedAttention` returned them.
    """
    oracle = _Oracle(bound, mask, inputs, scale)
    exact = oracle.run(plain=False)
    plain = None if bound.dtype == torch.float64 else oracle.run(plain=True)
    errors = {name: _largest_difference(value, exact[name]) for name, value in results.items()}
    plain_errors: dict[str, float | None] = dict.fromkeys(errors)
    if plain is not None:
        own = [_largest_difference(plain[name], exact[name]) for name in errors]
        everywhere = torch.tensor(own, dtype=torch.float64, device=bound.own_positions.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
        plain_errors = dict(zip(errors, everywhere.tolist(), strict=True))
    return [
        Verdict(name=name, rank=bound.mesh.rank, error=error, plain_error=plain_errors[name])
        for name, error in errors.items()
    ]


def _largest_difference(value: Tensor, wanted: Tensor) -> float:
    value = value.double()
    difference = torch.where(value == wanted, torch.zeros_like(value), (value - wanted).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


class _Oracle:
    """Eager attention of one rank's rows and keys, in float64 or ("plain") in the inputs' own type."""

    def __init__(self, bound: BoundPlan, mask: AttentionMask, inputs: dict[str, Tensor], scale: float) -> None:
        self.bound, self.mask, self.inputs, self.scale = bound, mask, inputs, scale
        self.own = bound.own_positions
        self.everywhere = torch.arange(inputs["q"].shape[1], device=self.own.device)
        self.heads, self.group = inputs["q"].shape[2], inputs["q"].shape[2] // inputs["k"].shape[2]

    def run(self, *, plain: bool) -> dict[str, Tensor]:
        """Return out, lse, dq, dk, dv of the own tokens."""
        dtype = self.inputs["q"].dtype if plain else torch.float64
        tokens, dim = self.own.numel(), self.inputs["q"].shape[3]
        wide = torch.float32 if plain else torch.float64
        out = torch.zeros(1, tokens, self.heads, dim, dtype=dtype, device=self.own.device)
        lse = torch.zeros(1, self.heads, tokens, dtype=wide, device=self.own.device)
        delta, dq = torch.zeros_like(lse), torch.zeros_like(out)
        for head in range(self.heads):
            self._rows(head, dtype, out, lse, delta, dq)
        dk, dv = self._keys(dtype, self._gather(lse), self._gather(delta))
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def _head(self, name: str, head: int, positions: Tensor, dtype: torch.dtype) -> Tensor:
        number = head if name in ("q", "grad_out") else head // self.group
        return self.inputs[name][0, positions, number].to(dtype)

    def _chunks(self, positions: Tensor, keys: int) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, CHUNK_ELEMENTS[positions.device.type] // max(keys, 1))
        for start in range(0, positions.numel(), size):
            part = slice(start, min(start + size, positions.numel()))
            yield part, positions[part]

    def _scores(self, head: int, q: Tensor, k: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        """Return masked scores [c, keys], in float32 at least."""
        scores = ((q @ k.T) * self.scale).to(torch.promote_types(q.dtype, torch.float32))
        return scores.masked_fill_(~whole(self.mask, head, rows, keys), float("-inf"))

    def _rows(self, head: int, dtype: torch.dtype, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
        k_all, v_all = (self._head(name, head, self.everywhere, dtype) for name in ("k", "v"))
        for part, rows in self._chunks(self.own, self.everywhere.numel()):
            seen = int(rows[-1]) + 1  # positions ascend, and nobody attends the future
            k, v = k_all[:seen], v_all[:seen]
            q, grad_out = (self._head(name, head, rows, dtype) for name in ("q", "grad_out"))
            scores = self._scores(head, q, k, rows, self.everywhere[:seen])
            lse[0, head, part] = scores.logsumexp(-1)
            share = torch.exp(scores - lse[0, head, part].nan_to_num(neginf=0.0)[:, None])
            out[0, part, head] = share.to(dtype) @ v
            grad_share = (grad_out @ v.T).to(share.dtype)
            delta[0, head, part] = (share * grad_share).sum(-1)
            grad_scores = share * (grad_share - delta[0, head, part][:, None])
            dq[0, part, head] = (grad_scores.to(dtype) @ k) * self.scale

    def _keys(self, dtype: torch.dtype, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        kv_heads, dim = self.inputs["k"].shape[2], self.inputs["k"].shape[3]
        dk, dv = (lse.new_zeros(1, self.own.numel(), kv_heads, dim) for _ in range(2))
        for head in range(self.heads):
            k_all, v_all = (self._head(name, head, self.own, dtype) for name in ("k", "v"))
            for _, rows in self._chunks(self.everywhere, self.own.numel()):
                seen = int(torch.searchsorted(self.own, rows[-1], right=True))
                k, v = k_all[:seen], v_all[:seen]
                q, grad_out = (self._head(name, head, rows, dtype) for name in ("q", "grad_out"))
                scores = self._scores(head, q, k, rows, self.own[:seen])
                share = torch.exp(scores - lse[0, head, rows].nan_to_num(neginf=0.0)[:, None])
                grad_share = (grad_out @ v.T).to(share.dtype)
                grad_scores = share * (grad_share - delta[0, head, rows][:, None])
                dv[0, :seen, head // self.group] += (share.to(dtype).T @ grad_out).to(dv.dtype)
                dk[0, :seen, head // self.group] += (grad_scores.to(dtype).T @ q).to(dk.dtype) * self.scale
        return dk.to(dtype), dv.to(dtype)

    def _gather(self, own: Tensor) -> Tensor:
        """Return [1, H, S] in natural order from every rank's [1, H, S_own]."""
        parts = [torch.empty_like(own) for _ in self.bound.positions]
        dist.all_gather(parts, own.contiguous())
        whole_sequence = own.new_empty(*own.shape[:2], self.everywhere.numel())
        for positions, part in zip(self.bound.positions, parts, strict=True):
            whole_sequence[:, :, positions] = part
        return whole_sequence
