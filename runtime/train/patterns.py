"""The patterns of a training run on their way to attention: chosen or replayed, watched, recorded.

Every mask that a layer uses passes here once per microbatch (recomputed layers do not choose again).

Shape legend: H query heads, N mask blocks, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...kernels.select.probe import Collectives
from ...traces.dataset.rows import HeadChoice
from ...traces.dataset.store import Trace
from ...traces.dataset.writer import LayerRecord
from ..attention.bound import BoundPlan, reach_of
from ..attention.graphs.graphs import Graphs
from ..attention.heads import Chooser
from ..attention.masks import RunningHash, cut_diagonals
from ..attention.patterns import PlannedChoice, collectives_over
from ..pattern.kept import KeptMass, measure_kept
from ..pattern.recorded import own_choice, own_pattern, pattern_of
from ..timing.spans import Clock, Exposure


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a training step looks at beyond its loss; of patterns, those of its first microbatch.

    measured: density, imbalance and exposed communication; exposed: the latter also where layers are CUDA graphs, which
    are launched kernel by kernel then. weighed: also the mass that patterns keep. recorded: whole
    patterns, for the trace, which asks for their mass too.
    """

    measured: bool = False
    exposed: bool = False
    weighed: bool = False
    recorded: bool = False


NOTHING = Observed()


class LayerLoad(NamedTuple):
    """What one layer's pattern costs and keeps.

    density [H]; imbalance: worker imbalance of active blocks (max over mean); kept_mass [H]: share of attention's mass
    that sampled queries keep, None where it was not weighed.
    """

    density: list[float]
    imbalance: float
    kept_mass: list[float] | None


class _Watched(NamedTuple):
    rows: Tensor  # [H, N] active key blocks of every query block
    kept: KeptMass | None
    record: AttentionMask | None


class LayerMasks:
    """Gives every layer its mask (`of_layer`), and watches what is given. Making it is collective.

    trace: its last step is replayed; None: the plan's selector chooses. exposure: counts the reductions of choosing.
    seed: of the sampled queries. replayed: one mask a layer, used in place of what would be. source: layer -> mask or
    chooser. documents int32 [S]: laid over the masks of this microbatch. observed: what is kept of them. again: use
    every layer's kept mask and choose none. keeping: keep every layer's mask, in the place of the one before. dense:
    attend everything before a token instead. graphs: of `PlannedChoice`.
    """

    def __init__(
        self, bound: BoundPlan, *, trace: Trace | None, clock: Clock, exposure: Exposure, seed: int,
        replayed: Sequence[AttentionMask] | None = None, graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        self._bound, self._clock, self._seed, self._replayed = bound, clock, seed, replayed
        self.source: Callable[[int], AttentionMask | Chooser]
        self._choice: PlannedChoice | None = None
        if trace is not None:
            self.source = bound.replayed(trace, trace.steps[-1]).__getitem__
        else:
            self._choice = PlannedChoice(bound, exposure.waiting, graphs=graphs)
            self.source = self._choice.of_layer
        self.documents: Tensor | None = None
        self.observed = NOTHING
        self.again = self.keeping = self.dense = False
        self._kept: dict[int, AttentionMask] = {}
        self._watched: dict[int, _Watched] = {}
        self._hash = RunningHash(bound.mesh.device)

    def of_layer(self, layer: int) -> Chooser:
        """Return a function of this rank's (q, k, scale) that gives the layer's mask. Collective when it chooses."""

        def choose(q: Tensor, k: Tensor, scale: float) -> AttentionMask:
            mask = self._bound.own_mask(layer, self.documents)
            if mask is None:
                mask = self._given(layer, q, k, scale)
            if self.documents is not None and mask.documents is not self.documents:
                mask = replace(mask, documents=self.documents)
            self._observe(layer, mask, q, k, scale)
            return mask

        return choose

    def _given(self, layer: int, q: Tensor, k: Tensor, scale: float) -> AttentionMask:
        if self.dense and self._choice is not None:
            if self.keeping and not self.again:
                self._chosen(layer, q, k, scale)  # for the steps that use it again
            return self._choice.everything()
        return self._kept[layer] if self.again else self._chosen(layer, q, k, scale)

    def _chosen(self, layer: int, q: Tensor, k: Tensor, scale: float) -> AttentionMask:
        if self._choice is not None:
            self._choice.documents = self.documents
        given = self.source(layer)
        with self._clock.span("choosing"):
            mask = given if isinstance(given, AttentionMask) else given(q, k, scale)
        if self._replayed is not None:
            mask = self._replayed[layer]
        if self.keeping:
            self._kept[layer] = mask
        return mask

    def take_hash(self) -> Tensor:
        """Return an int64 that stands for all masks given since the last call, on the device."""
        return self._hash.take()

    def take_loads(self) -> list[LayerLoad]:
        """Return, layer by layer, and forget what those watched cost and keep. Waits for the device."""
        first = np.arange(0, self._bound.plan.seq_len_tokens, self._bound.plan.block_size)
        owners = torch.from_numpy(self._bound.placement.owner_of_tokens()[first]).to(self._bound.mesh.device)  # [N]
        loads: list[LayerLoad] = []
        for _, watched in sorted(self._watched.items()):
            blocks = watched.rows.shape[1]
            density = watched.rows.sum(1).double() / (blocks * (blocks + 1) / 2)
            work = torch.zeros(self._bound.mesh.world_size, dtype=torch.float64, device=owners.device)
            work.index_add_(0, owners, watched.rows.sum(0).double())
            kept_mass = None if watched.kept is None else watched.kept.sampled.clamp(0, 1).tolist()
            loads.append(LayerLoad(density.tolist(), (work.max() / work.mean()).item(), kept_mass))
        self._watched = {layer: watched for layer, watched in self._watched.items() if watched.record is not None}
        return loads

    def take_records(self) -> dict[int, LayerRecord]:
        """Return the recorded layers on the host, as a trace takes them, and forget them."""
        spec = self._bound.plan.pattern
        records: dict[int, LayerRecord] = {}
        for layer, watched in sorted(self._watched.items()):
            assert watched.record is not None and watched.kept is not None
            reach = reach_of(self._bound.plan.model, layer)
            if reach.limits(self._bound.plan.seq_len_tokens):
                pattern = own_pattern(watched.record, reach)
                records[layer] = pattern, [own_choice(reach)] * pattern.num_heads
                continue
            pattern = pattern_of(watched.record)
            way = spec if spec.by_layer is None else spec.by_layer[layer]
            records[layer] = (
                pattern,
                [
                    HeadChoice(selector=way.selector or "replayed", settings=dict(way.settings), **its)
                    for its in watched.kept.by_head()
                ],
            )
        self._watched.clear()
        return records

    def _observe(self, layer: int, mask: AttentionMask, q: Tensor, k: Tensor, scale: float) -> None:
        with torch.no_grad():
            self._hash.note(mask)
            if self.observed.measured or self.observed.recorded:
                kept = self._measured(mask, q, k, scale) if self.observed.weighed else None
                self._watched[layer] = _Watched(block_rows(mask), kept, mask if self.observed.recorded else None)

    def _measured(self, mask: AttentionMask, q: Tensor, k: Tensor, scale: float) -> KeptMass:
        shard = self._bound.shard_tensors(q, k, self.documents)
        return measure_kept(shard, mask, scale=scale, seed=self._seed, collectives=self._collectives)

    @cached_property
    def _collectives(self) -> Collectives:
        return collectives_over(self._bound.mesh)


def block_rows(mask: AttentionMask) -> Tensor:
    """Return int64 [H, N]: how many key blocks are computed for each query block (causal; columns not counted)."""
    if mask.windows is None:
        return mask.active.long().cumsum(-1) if mask.is_toeplitz else mask.active.tril().sum(-1)
    cut = torch.from_numpy(cut_diagonals(mask)).to(mask.active.device)
    if mask.is_toeplitz:
        return (mask.active | cut).long().cumsum(-1)
    block = torch.arange(mask.blocks, device=cut.device)
    within = (block[:, None] - block[None, :]).clamp(min=0)
    return torch.stack([(head | own[within]).tril().sum(-1) for head, own in zip(mask.active, cut, strict=True)])
