"""One check of a training run by itself, from what it draws to what it says.

A check is made at the first step of a process and at every so many steps after the first of the run, between backward
and the optimizer's step: a run that fails one ends with the parameters of the step before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import Module

from ....traces.files import canonical_json
from ...attention.bound import BoundPlan
from ...comm.mesh import Mesh
from ...comm.reuse import common_group
from ...data.shards import TokenSequence
from ..batch import Microbatch
from ..config import VerifySection
from ..optimizer import TrainingError
from ..setup import Setup
from .attention import AttentionCheck, Compared
from .evidence import EVIDENCE, write_evidence
from .inputs import QUANTITIES as INPUTS
from .inputs import sequence_number, wrong_inputs
from .sample import draw_samples
from .states import GatheredWeights, KeptStates, number_of, settings_of

STATES = ("parameters", "optimizer states")
COMPARED = ("settings", "sequence", "weights")  # equal on all ranks, the sequence on those that share it


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the model was given in a microbatch of the step that is checked."""

    batch: Microbatch
    sequence: TokenSequence


class SelfCheck:
    """The checks of one rank of a training run. Making it is collective.

    attention: what watches planned attention; None where attention is a dense baseline, which is not looked into.
    """

    def __init__(
        self, setup: Setup, section: VerifySection, world: Mesh, bound: BoundPlan | None, model: Module,
        layers: Sequence[Module], optimizer: torch.optim.Optimizer,
    ) -> None:  # fmt: skip
        self._setup, self._config, self._section = setup, setup.config, section
        self._world, self._optimizer = world, optimizer
        self.attention = None if bound is None else AttentionCheck(bound)
        self._layers = len(layers)
        self._kept = KeptStates(model, optimizer, world.device)
        self._weights = GatheredWeights(layers, world.device)
        self._group = common_group(world, "self-check of all")
        self._first = True

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be checked."""
        return self._first or step % self._section.every_steps == 0

    def begin(self, step: int) -> None:
        """Before a step that is due: draw what is looked at. Nothing else changes states until it ends."""
        if self._first:
            self._kept.note()
        seed = (self._config.seed, step)
        self._weights.begin(int(np.random.default_rng(seed).integers(self._layers)))
        if self.attention is not None:
            section = self._section
            samples = draw_samples(self.attention.bound, layers=section.layers, rows=section.rows, seed=seed)
            self.attention.begin(samples)

    def after(self, next_step: int) -> None:
        """After a step: note the states, where the next one is due."""
        self._first = False
        if self.is_due(next_step):
            self._kept.note()

    def judge(self, step: int, given: Given, mesh: Mesh) -> None:
        """Compare all ranks, before the optimizer's step. Collective; waits for the device.

        mesh: of the ranks that share a sequence. Raises TrainingError, the same on all ranks, naming rank, place and
        quantity; what attention computed is kept in a file.
        """
        compared = self.attention.compared if self.attention is not None else []
        own = self._own_numbers(given, mesh)
        everyone = [torch.empty_like(own) for _ in range(self._world.world_size)]
        dist.all_gather(everyone, own, group=self._group)
        faults = self._faults(torch.stack(everyone).tolist())
        if not faults:
            return
        told = f"step {step}: the run's check of itself failed: {'; '.join(faults)}; the parameters are those before it"
        section = self._config.metrics or self._config.checkpoint
        if section is not None and compared:
            write_evidence(section.folder, compared, step=step, rank=self._world.rank)
            told += f"; wrong rows, where there are any, are in {section.folder}/{EVIDENCE}-*"
        raise TrainingError(told)

    def _own_numbers(self, given: Given, mesh: Mesh) -> torch.Tensor:
        """Return int64: flags of states and inputs, what must be equal, and excesses in thousandths."""
        wrong = wrong_inputs(
            given.batch, given.sequence, self._setup.plan, self._config.data.documents, rank=mesh.rank
        )  # fmt: skip
        flags = [name in wrong for name in INPUTS]
        equal = [number_of(canonical_json(dict(settings_of(self._optimizer)))), sequence_number(given.sequence)]
        looked = self.attention
        patterns = [] if looked is None else looked.patterns.values()
        excesses = [] if looked is None else [(1000 * one.excess).clamp(max=1e15).long() for one in looked.compared]
        device = self._world.device
        parts = [
            torch.tensor([*flags, *equal], device=device), self._weights.value[None],
            self._kept.changed().long(), *(one[None] for one in (*patterns, *excesses)),
        ]  # fmt: skip
        return torch.cat(parts)

    def _faults(self, everyone: list[list[int]]) -> list[str]:
        """Return what is wrong, in words. everyone: `_own_numbers` of each rank of the world."""
        inputs, compare, states = len(INPUTS), len(COMPARED), len(STATES)
        faults = [
            f"{name} of the batch on {_ranks(wrong)} are not those of its sequence"
            for place, name in enumerate(INPUTS)
            if (wrong := [rank for rank, one in enumerate(everyone) if one[place]])
        ]
        for place, name in enumerate(COMPARED, start=inputs):
            together = self._config.parallel.context if name == "sequence" else len(everyone)
            faults += _different(_WORDS[name], [one[place] for one in everyone], together)
        for place, name in enumerate(STATES, start=inputs + compare):
            if changed := [rank for rank, one in enumerate(everyone) if one[place]]:
                faults.append(f"{name} on {_ranks(changed)} changed since the last step ended")
        return faults + self._attention_faults([one[inputs + compare + states :] for one in everyone])

    def _attention_faults(self, everyone: list[list[int]]) -> list[str]:
        """Return what is wrong with attention, in words. everyone: of each rank, patterns and excesses."""
        looked, context = self.attention, self._config.parallel.context
        if looked is None:
            return []
        faults = []
        for place, layer in enumerate(looked.patterns):
            faults += _different(f"the pattern of layer {layer}", [one[place] for one in everyone], context)
        for place, one in enumerate(looked.compared, start=len(looked.patterns)):
            excesses = [numbers[place] / 1000 for numbers in everyone]
            wrong = [rank for rank, excess in enumerate(excesses) if not excess <= 1]
            if wrong:
                faults.append(_attention_fault(one, wrong, max(excesses), context))
        return faults


_WORDS = {
    "settings": "the setting of torch and the optimizer",
    "sequence": "the sequence that was read",
    "weights": "the checksum of a layer's gathered weights",
}


def _different(what: str, values: Sequence[int], together: int) -> list[str]:
    """Name the ranks whose value is not that of most, among each `together` consecutive ranks."""
    faults = []
    for first in range(0, len(values), together):
        group = values[first : first + together]
        usual, count = Counter(group).most_common(1)[0]
        odd = [first + place for place, value in enumerate(group) if value != usual]
        if odd and 2 * count > len(group):
            faults.append(f"{what} on {_ranks(odd)} is not that of the others")
        elif odd:
            faults.append(f"{what} differs between {_ranks(range(first, first + len(group)))}")
    return faults


def _attention_fault(one: Compared, wrong: Sequence[int], excess: float, context: int) -> str:
    heads = f"K/V head {one.sample.kv_head}" if one.quantity in ("dk", "dv") else f"query head {one.sample.head}"
    told = f"{one.quantity} of layer {one.sample.layer}, {heads}, is not what its pattern says on {_ranks(wrong)}"
    first = wrong[0] // context * context
    if len(wrong) == context - 1 > 1 and wrong[-1] < first + context:  # what a rank sends wrongly is right at home
        told += f" (on all but rank {next(rank for rank in range(first, first + context) if rank not in wrong)})"
    return f"{told}, {excess:,.0f} times the error that rounding explains" if excess < 1e12 else told


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
