"""Patterns chosen on the device, distributed over the ranks, as a plan's selector says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...kernels.mask import AttentionMask
from ...kernels.select.probe import Collectives
from ...traces.errors import InputError
from ..comm.channels import AllReduce, reducers
from .bound import BoundPlan
from .heads import Chooser
from .selectors import chosen_mask, make_selector


def with_capacity(mask: AttentionMask, columns_capacity: int) -> AttentionMask:
    """Return the mask with exactly `columns_capacity` column slots; InputError when it needs more."""
    if mask.column_capacity == columns_capacity:
        return mask
    if mask.column_capacity > columns_capacity:
        raise InputError(
            f"the selector may choose {mask.column_capacity} columns; the plan has room for {columns_capacity}",
            field="columns_capacity",
        )
    heads, missing = mask.heads, columns_capacity - mask.column_capacity
    empty = torch.full((heads, missing), mask.seq_len_tokens, dtype=torch.int32, device=mask.active.device)
    return replace(mask, columns=empty if mask.columns is None else torch.cat([mask.columns, empty], dim=1))


class PlannedChoice:
    """Chooses every layer's mask with the plan's selector, distributed over the ranks of its mesh.

    Making it is collective. Raises InputError when the plan replays a trace.
    """

    def __init__(self, bound: BoundPlan) -> None:
        plan = bound.plan
        if plan.pattern.source != "choose" or plan.pattern.selector is None:
            raise InputError("the plan replays a trace: give the trace", field="pattern.source")
        self._bound = bound
        self._selector = make_selector(plan.pattern.selector, plan.pattern.settings)
        total, largest = reducers(bound.mesh)
        self._collectives = Collectives(all_reduce_sum=total, all_reduce_max=largest)

    def wrap_reductions(self, wrap: Callable[[AllReduce], AllReduce]) -> None:
        """Put `wrap` around the reductions over ranks that choosing needs, to measure them."""
        before = self._collectives
        self._collectives = Collectives(
            all_reduce_sum=wrap(before.all_reduce_sum), all_reduce_max=wrap(before.all_reduce_max)
        )

    def of_layer(self, layer: int) -> Chooser:
        """Return a function of this rank's (q, k, scale) that chooses that layer's mask. Collective when called."""

        def choose(q: torch.Tensor, k: torch.Tensor, scale: float) -> AttentionMask:
            shard = self._bound.shard_tensors(q, k)
            mask = chosen_mask(self._selector, shard, layer=layer, scale=scale, collectives=self._collectives)
            return with_capacity(mask, self._bound.plan.columns_capacity)

        return choose
