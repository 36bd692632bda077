"""The patterns of a training run on their way to attention: chosen or replayed, watched, recorded.

Every mask that a layer uses passes here once per microbatch (recomputed layers do not choose again).

Shape legend: H query heads, N mask blocks, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...kernels.select.choose import Collectives, ShardTensors
from ...kernels.select.probe import kept_mass_probe, kept_mass_sampled
from ...planner.plan import Plan
from ...traces.dataset.rows import HeadChoice
from ...traces.dataset.store import LayerRecord, Trace
from ..attention.patterns import PlannedChoice, RunningHash, replayed_mask
from ..attention.planned import Chooser
from ..comm.channels import reducers
from ..comm.mesh import Mesh
from ..hf.capture import pattern_of
from ..timing.exposure import Exposure
from ..timing.spans import Clock


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What one layer's pattern costs and keeps.

    density [H]; imbalance: worker imbalance of active blocks (max over mean); kept_mass [H]: share of attention's mass
    that sampled queries keep, None where it was not weighed.
    """

    density: list[float]
    imbalance: float
    kept_mass: list[float] | None


@dataclass(eq=False)
class _Watched:
    rows: Tensor  # [H, N] active key blocks of every query block
    masses: tuple[Tensor, Tensor] | None = None  # kept mass [H], by the probe's queries and by sampled ones
    record: AttentionMask | None = None


@dataclass(eq=False)
class LayerMasks:
    """Gives every layer its mask (`of_layer`), and watches what is given.

    source: layer -> mask or chooser; owners int64 [N]: which rank owns each query block.
    documents int32 [S]: laid over the masks of this microbatch. watch, weigh, record: whether this microbatch's density
    and imbalance, kept mass, and whole patterns are kept.
    """

    plan: Plan
    mesh: Mesh
    source: Callable[[int], AttentionMask | Chooser]
    positions: Tensor
    clock: Clock | None = None
    documents: Tensor | None = None
    watch: bool = False
    weigh: bool = False
    record: bool = False
    seed: int = 0
    _watched: dict[int, _Watched] = field(default_factory=dict)
    _collectives: Collectives | None = None

    def __post_init__(self) -> None:
        self._hash = RunningHash(self.mesh.device)

    def of_layer(self, layer: int) -> Chooser:
        """Return a function of this rank's (q, k, scale) that gives the layer's mask. Collective when it chooses."""

        def choose(q: Tensor, k: Tensor, scale: float) -> AttentionMask:
            given = self.source(layer)
            with nullcontext() if self.clock is None else self.clock.span("choosing"):
                mask = given if isinstance(given, AttentionMask) else given(q, k, scale)
            if self.documents is not None:
                mask = replace(mask, documents=self.documents)
            self._observe(layer, mask, q, k, scale)
            return mask

        return choose

    def take_hash(self) -> Tensor:
        """Return an int64 that stands for all masks given since the last call, on the device."""
        return self._hash.take()

    def take_loads(self) -> dict[int, LayerLoad]:
        """Return and forget what the watched layers cost and keep. Waits for the device."""
        owners = self._owners()
        loads: dict[int, LayerLoad] = {}
        for layer, watched in sorted(self._watched.items()):
            blocks = watched.rows.shape[1]
            density = watched.rows.sum(1).double() / (blocks * (blocks + 1) / 2)
            work = torch.zeros(self.mesh.world_size, dtype=torch.float64, device=owners.device)
            work.index_add_(0, owners, watched.rows.sum(0).double())
            loads[layer] = LayerLoad(
                density=density.tolist(),
                imbalance=(work.max() / work.mean()).item(),
                kept_mass=None if watched.masses is None else watched.masses[1].clamp(0, 1).tolist(),
            )
        self._watched = {layer: watched for layer, watched in self._watched.items() if watched.record is not None}
        return loads

    def take_records(self) -> dict[int, LayerRecord]:
        """Return the recorded layers on the host, as a trace takes them, and forget them."""
        spec = self.plan.pattern
        records: dict[int, LayerRecord] = {}
        for layer, watched in sorted(self._watched.items()):
            assert watched.record is not None and watched.masses is not None
            pattern = pattern_of(watched.record)
            masses = [mass.clamp(0, 1).tolist() for mass in watched.masses]
            records[layer] = pattern, [
                HeadChoice(
                    selector=spec.selector or "replayed", settings=dict(spec.settings), kept_mass_probe=near,
                    kept_mass_sampled=far,
                )
                for near, far in zip(*masses, strict=True)
            ]  # fmt: skip
        self._watched.clear()
        return records

    def _observe(self, layer: int, mask: AttentionMask, q: Tensor, k: Tensor, scale: float) -> None:
        with torch.no_grad():
            self._hash.note(mask)
            if self.watch or self.record:
                masses = self._masses(mask, q, k, scale) if self.weigh or self.record else None
                self._watched[layer] = _Watched(block_rows(mask), masses, mask if self.record else None)

    def _masses(self, mask: AttentionMask, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if self._collectives is None:
            total, largest = reducers(self.mesh)
            self._collectives = Collectives(all_reduce_sum=total, all_reduce_max=largest)
        shard = ShardTensors(
            q=q.detach(), k=k.detach(), positions=self.positions, seq_len_tokens=self.plan.seq_len_tokens,
            block_size=self.plan.block_size, granularity_tokens=self.plan.placement.granularity_tokens,
            documents=self.documents,
        )  # fmt: skip
        common: dict[str, Any] = {"scale": scale, "collectives": self._collectives}
        return kept_mass_probe(shard, mask, **common), kept_mass_sampled(shard, mask, seed=self.seed, **common)

    def _owners(self) -> Tensor:
        """Return int64 [N], the rank that owns the first token of each block."""
        placement, size = self.plan.make_placement(), self.plan.block_size
        blocks = -(-self.plan.seq_len_tokens // size)
        owners = torch.zeros(blocks, dtype=torch.int64)
        for rank in range(self.mesh.world_size):
            first = torch.from_numpy(placement.positions(rank))
            first = first[(first % size == 0) & (first < self.plan.seq_len_tokens)]
            owners[first // size] = rank
        return owners.to(self.mesh.device)


def planned_masks(
    plan: Plan, mesh: Mesh, positions: Tensor, *, trace: Trace | None, clock: Clock | None, seed: int,
    exposure: Exposure | None = None,
) -> LayerMasks:  # fmt: skip
    """Return the masks of a plan: replayed from the trace's last step, or chosen. Collective.

    exposure: counts the reductions of choosing.
    """
    if trace is not None:
        step = trace.steps[-1]
        masks = [
            replayed_mask(plan, trace.layer_pattern(step, layer), layer=layer, device=mesh.device)
            for layer in range(plan.model.layers)
        ]
        source: Callable[[int], AttentionMask | Chooser] = masks.__getitem__
    else:
        choice = PlannedChoice(plan, mesh, positions)
        if exposure is not None:
            choice.wrap_reductions(exposure.reduction)
        source = choice.of_layer
    return LayerMasks(plan=plan, mesh=mesh, source=source, positions=positions, clock=clock, seed=seed)


def replay_and_pay(masks: list[AttentionMask], choosers: Callable[[int], Chooser]) -> Callable[[int], Chooser]:
    """Return a source that chooses, discards the choice and replays `masks`: benchmarks at a stated density."""

    def of_layer(layer: int) -> Chooser:
        def choose(q: Tensor, k: Tensor, scale: float) -> AttentionMask:
            choosers(layer)(q, k, scale)
            return masks[layer]

        return choose

    return of_layer


def block_rows(mask: AttentionMask) -> Tensor:
    """Return int64 [H, N]: how many key blocks are active for each query block (causal; columns not counted)."""
    if mask.is_toeplitz:
        return mask.active.long().cumsum(-1)
    return torch.stack([head.tril().sum(-1) for head in mask.active])
