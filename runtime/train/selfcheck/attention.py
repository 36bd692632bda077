"""Watching a few layers of a step: what attention returned for sampled tokens, beside what its definition says.

Shape legend: B batch, S_own tokens of this rank's shard, H query heads, H_kv K/V heads, D head dim, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch.distributed as dist
from torch import Tensor

from ....kernels.mask import whole
from ...attention.bound import BoundPlan
from ...attention.masks import pattern_hash
from ...attention.planned import PlayedBackward, PlayedForward
from ...comm.mesh import Mesh
from ...comm.reuse import common_group
from .rows import (
    AttendedRows,
    Bounded,
    KeyRows,
    Precision,
    Reductions,
    Scoring,
    SomeKeys,
    SomeQueries,
    attend_rows,
    query_gradients,
)
from .sample import Sample
from .states import checksum

PART_TOKENS = 8192  # of a shard at once: some 50 MB in float64


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """One quantity of one sample on this rank. excess: a scalar on the device, above 1.0 where something is wrong.

    positions: int64 [r] of the tokens compared; found, wanted and bound: [r, D], or [r] for lse.
    """

    sample: Sample
    quantity: str
    positions: Tensor
    found: Tensor
    wanted: Bounded

    @property
    def excess(self) -> Tensor:
        """The largest error over its bound."""
        return self.wanted.excess(self.found)


@dataclass(eq=False)
class _Begun:
    sample: Sample
    rows: AttendedRows


@dataclass(eq=False)
class AttentionCheck:
    """Compares the sampled layers of one forward and backward pass as they are played (`PlannedAttention.watch`).

    Collective: all ranks draw the same samples. Each layer is looked at once: in the first microbatch of a step.
    """

    bound: BoundPlan
    compared: list[Compared] = field(default_factory=list)
    patterns: dict[int, Tensor] = field(default_factory=dict)  # layer -> int64 that stands for the mask that was used
    _awaited: dict[int, Sample] = field(default_factory=dict)
    _begun: dict[int, _Begun] = field(default_factory=dict)

    def begin(self, samples: Sequence[Sample]) -> None:
        """Look at these layers when they are next played, and forget what was seen before."""
        self.compared.clear()
        self.patterns.clear()
        self._begun.clear()
        self._awaited = {sample.layer: sample for sample in samples}

    def after_forward(self, layer: int | None, played: PlayedForward) -> None:
        """Compare out and lse of the sampled queries of a layer, if it is one of those awaited."""
        sample = None if layer is None else self._awaited.pop(layer, None)
        if sample is None or layer is None:
            return
        q = self._over.add(sample.queries.gathered(played.q[0, :, sample.head]))
        keys = partial(self._keys, sample, played)
        scoring = _scoring(played, sample.head)
        rows = attend_rows(q, keys, scoring=scoring, precision=self._precision, over=self._over)
        self._begun[layer] = _Begun(sample, rows)
        documents = [] if played.mask.documents is None else [played.mask.documents]
        self.patterns[layer] = pattern_hash([played.mask]) + checksum(documents, played.q.device)
        own = sample.queries.local
        self._compare(sample, "out", played.out[0, own, sample.head], rows.out)
        self._compare(sample, "lse", played.lse[0, sample.head, own], rows.lse)

    def after_backward(self, layer: int | None, played: PlayedBackward) -> None:
        """Compare dq of the same queries, and dk and dv of the sampled keys."""
        begun = None if layer is None else self._begun.pop(layer, None)
        if begun is None:
            return
        sample, forward = begun.sample, played.forward
        grad_out = self._over.add(sample.queries.gathered(played.grad_out[0, :, sample.head]))
        keys, precision = partial(self._keys, sample, forward), self._precision
        scoring = _scoring(forward, sample.head)
        dq = query_gradients(begun.rows, grad_out, keys, scoring=scoring, precision=precision, over=self._over)
        self._compare(sample, "dq", played.dq[0, sample.queries.local, sample.head], dq)
        k, v = (self._over.add(sample.keys.gathered(x[0, :, sample.kv_head])) for x in (forward.k, forward.v))
        rows = KeyRows(k, v, scoring=scoring, precision=precision)
        for head, part in product(range(*sample.heads), self._parts()):
            allowed = whole(forward.mask, head, self.bound.own_positions[part], sample.keys.positions)
            rows.add(_some_queries(played, head, part), allowed)
        for name, found, wanted in zip(("dk", "dv"), (played.dk, played.dv), rows.finish(self._over), strict=True):
            self._compare(sample, name, found[0, sample.keys.local, sample.kv_head], wanted)

    def _compare(self, sample: Sample, quantity: str, found: Tensor, wanted: Bounded) -> None:
        tokens = sample.keys if quantity in ("dk", "dv") else sample.queries
        own = Compared(
            sample=sample, quantity=quantity, positions=tokens.positions[tokens.own], found=found.clone(),
            wanted=wanted.rows(tokens.own),
        )  # fmt: skip
        self.compared.append(own)

    def _keys(self, sample: Sample, played: PlayedForward) -> Iterator[SomeKeys]:
        """Yield this rank's keys, some at a time."""
        for part in self._parts():
            k, v = (x[0, part, sample.kv_head].double() for x in (played.k, played.v))
            own = self.bound.own_positions[part]
            yield SomeKeys(k, v, whole(played.mask, sample.head, sample.queries.positions, own))

    def _parts(self) -> Iterator[slice]:
        """Yield slices of this rank's tokens."""
        tokens = self.bound.own_positions.numel()
        return (slice(first, min(first + PART_TOKENS, tokens)) for first in range(0, tokens, PART_TOKENS))

    @property
    def _precision(self) -> Precision:
        return Precision.of(self.bound.dtype)

    @property
    def _over(self) -> Reductions:
        return reductions_over(self.bound.mesh)


def _scoring(played: PlayedForward, head: int) -> Scoring:
    """Return how a head's scores were made. Between heads only the sinks differ, which dk does not ask for."""
    sinks = played.form.sinks
    sink = None if sinks is None else sinks.detach()[head].double()
    return Scoring(scale=played.scale, softcap=played.form.softcap, sink=sink)


def reductions_over(mesh: Mesh) -> Reductions:
    """Return what adds and compares over all ranks of the mesh, on a process group for that alone. Collective."""
    if mesh.world_size == 1:
        return Reductions(add=lambda tensor: tensor, largest=lambda tensor: tensor)
    group = common_group(mesh, "self-check")

    def reduce(operation: dist.ReduceOp.RedOpType, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, op=operation, group=group)
        return tensor

    return Reductions(add=partial(reduce, dist.ReduceOp.SUM), largest=partial(reduce, dist.ReduceOp.MAX))


def _some_queries(played: PlayedBackward, head: int, part: slice) -> SomeQueries:
    q, grad_out, out = (x[0, part, head].double() for x in (played.forward.q, played.grad_out, played.forward.out))
    products = grad_out * out
    return SomeQueries(
        q=q, grad_out=grad_out, lse=played.forward.lse[0, head, part].double(), delta=products.sum(1),
        delta_size=products.abs().sum(1),
    )  # fmt: skip
