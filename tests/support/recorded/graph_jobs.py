"""Jobs for rank_pool.py that play layers kernel by kernel and as recordings: `function(mesh, **arguments)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rank_jobs import global_tensors
from sparsering.planner.plan import Plan
from sparsering.runtime.attention.bound import bind
from sparsering.runtime.attention.graphs.graphs import EAGER_CALLS, Compute, CudaGraphs, Graphs, Inputs, Outputs
from sparsering.runtime.attention.graphs.setting import graphs_for
from sparsering.runtime.attention.graphs.words import GraphsSetting
from sparsering.runtime.attention.masks import mask_of
from sparsering.runtime.attention.patterns import PlannedChoice
from sparsering.runtime.attention.planned import PlannedAttention
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.pattern.form import AttentionForm
from sparsering.traces.errors import UnsupportedError
from sparsering.traces.pattern import LayerPattern


@dataclass(eq=False)
class _DoneAgain:
    """A recording for machines without a GPU: calls the function again, on the tensors that it was recorded with."""

    compute: Compute
    inputs: Inputs
    outputs: Outputs
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for kept, fresh in zip(self.outputs, self.compute(self.inputs), strict=True):
            if kept is not None and fresh is not None:
                kept.copy_(fresh)

    def drop(self) -> None:
        pass


class _Recorder:
    """Records with CUDA graphs on GPUs; counts recordings."""

    def __init__(self, mesh: Mesh) -> None:
        self._graphs = CudaGraphs() if mesh.device.type == "cuda" else None
        self.recorded = 0

    def __call__(self, compute: Compute, inputs: Inputs) -> Any:
        self.recorded += 1
        if self._graphs is not None:
            return self._graphs(compute, inputs)
        # All ranks record at the same call: computing what is to be replayed is no harm. Its values are spoilt.
        shaped = tuple(None if x is None else torch.full_like(x, -1) for x in compute(inputs))
        return _DoneAgain(compute, inputs, shaped)


class Compared(NamedTuple):
    """Of every layer and every tensor: whether recording and launching gave the same bits; and how many recordings."""

    same: dict[str, bool]
    recorded: int


def layers_recorded(
    mesh: Mesh, *, plan: Plan, patterns: Sequence[LayerPattern | None], sinks: tuple[float, ...] | None = None,
    softcap: float | None = None, paused_layers: Sequence[int] = (), larger_after: int | None = None,
) -> Compared:  # fmt: skip
    """Play one layer for each pattern, all forwards first, launched and recorded; None: the plan's selector chooses.

    paused_layers: those whose forward is launched in both. larger_after: before the forward of this layer the memory of
    buffers is another.
    """
    recorder = _Recorder(mesh)
    graphs = Graphs(recorder)
    played = [_Played(mesh, plan, None), _Played(mesh, plan, graphs)]
    for one in played:
        for layer, pattern in enumerate(patterns):
            graphs.paused = layer in paused_layers
            if layer == larger_after:
                one.move_buffers()
            one.forward(layer, pattern, AttentionForm(softcap=softcap, sinks=_leaf(sinks, mesh)))
        graphs.paused = False
        one.backward()
    plain, recorded = (one.results for one in played)
    assert plain.keys() == recorded.keys() and len(plain) >= 5 * len(patterns) > 5 * EAGER_CALLS
    same = {name: torch.equal(plain[name], recorded[name]) for name in plain}
    return Compared(same, recorder.recorded)


def _leaf(sinks: tuple[float, ...] | None, mesh: Mesh) -> torch.Tensor | None:
    return None if sinks is None else torch.tensor(sinks, device=mesh.device, requires_grad=True)


class _Played:
    """Layers of one planned attention, and what they gave."""

    def __init__(self, mesh: Mesh, plan: Plan, graphs: Graphs | None) -> None:
        self.mesh, self.plan, self.bound = mesh, plan, bind(plan, mesh)
        self.planned = PlannedAttention(self.bound, graphs=graphs)
        self.choice = None if plan.pattern.source == "trace" else PlannedChoice(self.bound, graphs=graphs)
        self.results: dict[str, torch.Tensor] = {}
        self.layers: list[tuple[Any, ...]] = []

    def forward(self, layer: int, pattern: LayerPattern | None, form: AttentionForm) -> None:
        """Play a layer's forward on tensors of its own."""
        model, tokens = self.plan.model, self.bound.placement.padded_tokens
        given = global_tensors(tokens, (model.heads, model.kv_heads), model.head_dim, seed=100 + layer, batch=1)
        positions = self.bound.own_positions.cpu()
        q, k, v, grad_out = (x[:, positions].to(self.mesh.device, self.bound.dtype) for x in given)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if pattern is None:
            assert self.choice is not None
            mask: Any = self.choice.of_layer(layer)
        else:
            mask = mask_of(pattern, columns_capacity=self.plan.columns_capacity, device=self.mesh.device)
        out, lse = self.planned.with_lse(q, k, v, mask, layer=layer, form=form)
        self.results |= {f"{layer} out": out.detach().clone(), f"{layer} lse": lse.clone()}
        self.layers.append((layer, out, grad_out, leaves, form.sinks))

    def backward(self) -> None:
        """Play all backwards, the last layer's first."""
        for layer, out, grad_out, leaves, sinks in reversed(self.layers):
            out.backward(grad_out)
            self.results |= {f"{layer} d{name}": x.grad for name, x in zip("qkv", leaves, strict=True)}
            if sinks is not None:
                self.results[f"{layer} dsinks"] = sinks.grad

    def move_buffers(self) -> None:
        """Let two sequences at a time be played, whose buffers need more memory than there is."""
        model, tokens = self.plan.model, self.bound.own_positions.numel()
        k = torch.zeros(2, tokens, model.kv_heads, model.head_dim, device=self.mesh.device, dtype=self.bound.dtype)
        for direction in self.bound.programs:
            self.planned.slots(direction, k)


def setting(mesh: Mesh, *, plan: Plan, setting: GraphsSetting) -> str | None:
    """Ask for what layers are recorded in; return the refusal, None where they are launched one by one."""
    try:
        graphs = graphs_for(bind(plan, mesh), setting)
    except UnsupportedError as error:
        return str(error)
    assert graphs is None
    return None
