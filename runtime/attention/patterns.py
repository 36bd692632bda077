"""Patterns chosen on the device, distributed over the ranks, as a plan's selector says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ALONE, Collectives
from ...traces.errors import InputError
from ..comm.channels import CommunicationError, Waiting
from ..comm.mesh import Mesh
from ..comm.reuse import common_group
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


def collectives_over(mesh: Mesh, waiting: Waiting = nullcontext) -> Collectives:
    """Return what choosing patterns needs of all ranks, on a process group for that alone. Collective.

    waiting: made around every wait for other ranks, to measure it.
    """
    if mesh.world_size == 1:
        return ALONE
    group = common_group(mesh, "choosing")

    def reduce(operation: dist.ReduceOp.RedOpType, tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.contiguous()  # may be overwritten: see Collectives
        try:
            with waiting():
                dist.all_reduce(result, op=operation, group=group)
        except RuntimeError as error:
            raise CommunicationError(f"choosing patterns over all ranks: {error}") from error
        return result

    return Collectives(
        all_reduce_sum=partial(reduce, dist.ReduceOp.SUM), all_reduce_max=partial(reduce, dist.ReduceOp.MAX)
    )


class PlannedChoice:
    """Chooses every layer's mask with the plan's selector, distributed over the ranks of its mesh.

    Making it is collective. waiting: see `collectives_over`. Raises InputError when the plan replays a trace.
    """

    def __init__(self, bound: BoundPlan, waiting: Waiting = nullcontext) -> None:
        plan = bound.plan
        if plan.pattern.source != "choose" or plan.pattern.selector is None:
            raise InputError("the plan replays a trace: give the trace", field="pattern.source")
        self._bound = bound
        self._selector = make_selector(plan.pattern.selector, plan.pattern.settings)
        self._collectives = collectives_over(bound.mesh, waiting)

    def of_layer(self, layer: int) -> Chooser:
        """Return a function of this rank's (q, k, scale) that chooses that layer's mask. Collective when called."""

        def choose(q: torch.Tensor, k: torch.Tensor, scale: float) -> AttentionMask:
            shard = self._bound.shard_tensors(q, k)
            mask = chosen_mask(self._selector, shard, layer=layer, scale=scale, collectives=self._collectives)
            return with_capacity(mask, self._bound.plan.columns_capacity)

        return choose
