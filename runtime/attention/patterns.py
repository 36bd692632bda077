"""Patterns chosen on the device, distributed over the ranks, as a plan's selector says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ALONE, Collectives
from ...kernels.select.registry import Selector
from ...traces.errors import InputError
from ..comm.channels import CommunicationError, Waiting
from ..comm.mesh import Mesh
from ..comm.reuse import common_group
from ..pattern.by_layer import planned_selector
from ..pattern.form import WHOLE
from ..pattern.selectors import chosen_mask
from .bound import BoundPlan
from .graphs.graphs import Graphs, Inputs, Outputs
from .heads import Chooser, Pattern
from .masks import with_capacity


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

    Making it is collective. waiting: see `collectives_over`. graphs: choices are recorded there, where the selector can
    be; see `graphs_for`. documents: int32 [S] of all tokens of what comes next, which only selectors that keep
    documents apart take. Raises InputError when the plan replays a trace.
    """

    documents: torch.Tensor | None = None

    def __init__(self, bound: BoundPlan, waiting: Waiting = nullcontext, *, graphs: Graphs | None = None) -> None:
        plan = bound.plan
        if plan.pattern.source != "choose":
            raise InputError("the plan replays a trace: give the trace", field="pattern.source")
        self._bound, self._graphs = bound, graphs
        self._selector = planned_selector(plan.pattern, layers=plan.model.layers)
        self._collectives = collectives_over(bound.mesh, waiting)
        self._everything: AttentionMask | None = None

    def of_layer(self, layer: int) -> Pattern:
        """Return a function of this rank's (q, k, scale) that chooses that layer's mask. Collective when called.

        Of a layer that the model itself lets look less far than the sequence, its mask: there is nothing to choose.
        """
        own = self._bound.own_mask(layer)
        return self._chooser(layer) if own is None else own

    def everything(self) -> AttentionMask:
        """Return the mask under which every token sees all before it: of its document, where there are any."""
        plan = self._bound.plan
        if self._everything is None:
            whole = WHOLE.mask(heads=plan.model.heads, seq_len_tokens=plan.seq_len_tokens,
                               block_size=plan.block_size, device=self._bound.mesh.device)  # fmt: skip
            self._everything = with_capacity(whole, plan.columns_capacity)
        if self.documents is None:
            return self._everything
        return replace(self._everything, documents=self.documents)

    def _chooser(self, layer: int) -> Chooser:
        def choose(q: torch.Tensor, k: torch.Tensor, scale: float) -> AttentionMask:
            graphs = self._graphs
            if graphs is None or graphs.paused or self.documents is not None or not self._of(layer).recordable:
                return self._chosen(q, k, layer, scale)
            with torch.no_grad():
                return self._recorded(graphs, q.detach(), k.detach(), layer, scale)

        return choose

    def _of(self, layer: int) -> Selector:
        return self._selector.of_layer(layer)

    def _chosen(self, q: torch.Tensor, k: torch.Tensor, layer: int, scale: float) -> AttentionMask:
        shard = self._bound.shard_tensors(q, k, self.documents)
        mask = chosen_mask(self._selector, shard, layer=layer, scale=scale, collectives=self._collectives)
        return with_capacity(mask, self._bound.plan.columns_capacity)

    def _recorded(
        self, graphs: Graphs, q: torch.Tensor, k: torch.Tensor, layer: int, scale: float
    ) -> AttentionMask:  # fmt: skip
        """Return what is chosen, by a recording that all layers with this selector share."""

        def choose(given: Inputs) -> Outputs:
            own_q, own_k = given["q"], given["k"]
            assert own_q is not None and own_k is not None
            mask = self._chosen(own_q, own_k, layer, scale)
            assert mask.windows is None and not mask.anchors, "only tensors are kept of a choice"
            return mask.active, mask.columns

        key = "choosing", self._of(layer), scale, q.shape, k.shape, q.dtype
        active, columns = graphs.call(key, choose, {"q": q, "k": k})
        assert active is not None
        return self._bound.shard_tensors(q, k).chosen(active, columns)
