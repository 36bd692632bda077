"""`attach`: a Hugging Face model computes its attention over ranks as a plan says, once its audit lets it through."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from ...planner.plan import Plan
from ...traces.dataset.store import Trace
from ...traces.errors import InputError, UnsupportedError
from ..attention.bound import BoundPlan, bind
from ..attention.graphs.setting import graphs_for
from ..attention.graphs.words import GraphsSetting
from ..attention.patterns import PlannedChoice
from ..attention.planned import PlannedAttention
from ..audit.audit import require_model
from ..comm.mesh import Mesh, naming_lost_ranks
from ..comm.reuse import common_group
from ..model.attached import Attached, LayerMask, plain_model
from ..model.calls.placing import uncounted_token
from ..model.first_loss import check_first_loss
from ..model.router_loss import router_loss_of
from ..model.shape import check_angles, model_body, model_shape, setting


def attach(
    model: Module, plan: Plan, mesh: Mesh, *, trace: Trace | None = None, training_step: int | None = None,
    cuda_graphs: GraphsSetting = "auto",
) -> Attached:  # fmt: skip
    """Make `model` compute its attention over the ranks of `mesh` as `plan` says. Collective.

    model: a transformers model, or a peft model around one. trace: whose patterns of `training_step` (default: the
    last) are replayed, when the plan replays a trace. cuda_graphs: play layers as CUDA graphs; "auto": where they can
    be and a rank's queries are small, "always", "never".
    Raises InputError when world size, model shape or trace are not the plan's, and UnsupportedError with the reason
    when the model does not pass the audit (`audit.py`), before any GPU work.
    """
    body = plain_model(model)
    plan.require(world_size=mesh.world_size, model=model_shape(body.config))
    check_angles(body)
    require_model(body, seq_len_tokens=plan.seq_len_tokens, mesh=mesh)
    check_padding(body.config, plan, first_position=uncounted_token(model_body(body))[1])
    bound = bind(plan, mesh)
    chosen = plan.pattern.source == "choose"
    graphs = graphs_for(bound, cuda_graphs)
    masks = PlannedChoice(bound, graphs=graphs).of_layer if chosen else _replay(bound, trace, training_step)
    return Attached(
        body, PlannedAttention(bound, graphs=graphs), masks, positions=bound.own_positions,
        seq_len_tokens=plan.seq_len_tokens, one_sequence=chosen, first_loss=partial(check_first_loss, mesh),
        router=router_loss_of(body, bound.own_positions < plan.seq_len_tokens, partial(_total, mesh)),
    )  # fmt: skip


def check_padding(config: Any, plan: Plan, *, first_position: int = 0) -> None:
    """Refuse padding beyond a model's positions: a table of them, or angles that change there, must reach so far.

    first_position: where the first token is in the table.
    """
    limit, rope = setting(config, "max_position_embeddings"), setting(config, "rope_parameters")
    padded_tokens = plan.make_placement().padded_tokens
    changes = rope is None or "dynamic" in str(rope)
    limit = limit - first_position if type(limit) is int else None
    if limit is not None and changes and plan.seq_len_tokens <= limit < padded_tokens:
        raise UnsupportedError(f"is {limit}; the plan pads {plan.seq_len_tokens} tokens to {padded_tokens}: choose a "
                               "length that its ranks share evenly", field="max_position_embeddings")  # fmt: skip


def _replay(bound: BoundPlan, trace: Trace | None, training_step: int | None) -> LayerMask:
    plan = bound.plan
    if trace is None:
        raise InputError("the plan replays a trace: give the trace", field="trace")
    if plan.pattern.trace_sha256 not in (None, trace.digest()):
        raise InputError(f"is {trace.digest()[:16]}, not the plan's {plan.pattern.trace_sha256}", field="trace")
    step = trace.steps[-1] if training_step is None else training_step
    missing = set(range(plan.model.layers)) - set(trace.layers)
    if missing or step not in trace.steps:
        raise InputError(f"lacks layers {sorted(missing)} or step {step}", field="trace")
    return bound.replayed(trace, step).__getitem__


def _total(mesh: Mesh, counts: Tensor) -> Tensor:
    """Add up whole numbers over the ranks of the mesh. Collective."""
    with naming_lost_ranks(mesh):
        dist.all_reduce(counts, group=common_group(mesh, "router losses"))
    return counts
