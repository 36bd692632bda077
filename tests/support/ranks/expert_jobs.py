"""Jobs for rank_pool.py about models with experts: called as `function(mesh, **arguments)` on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model_cases import case_model, dense_plan
from rank_jobs import as_array
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.hf.attach import attach
from sparsering.runtime.model.router_loss import RouterLoss
from sparsering.runtime.model.shard import shard
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.loop import Trainer
from sparsering.runtime.train.patterns import Observed
from sparsering.runtime.train.setup import set_up


def attached_steps(
    mesh: Mesh, *, name: str, batches: list[np.ndarray], checkpointing: dict[str, Any] | None = None,
    own_counts: bool = False, experts: str = "eager",
) -> dict[str, Any]:  # fmt: skip
    """Accumulate the gradients of an attached case over batches [1, S]; return its parts of the losses, and of aux.

    checkpointing: of transformers, with these settings. own_counts: a planted fault, ranks do not add up their choices.
    experts: transformers' implementation; all but "eager" in float32.
    """
    dtype = "float64" if experts == "eager" else "float32"
    model = case_model(name, dtype=getattr(torch, dtype)).train()
    model.set_experts_implementation(experts)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    plan = dense_plan(model.config, world_size=mesh.world_size, dtype=dtype)
    attached = attach(model, plan, mesh)
    assert isinstance(attached.router, RouterLoss)
    if own_counts:
        attached.router._total = lambda counts: counts
    losses, parts, said = [], [], ""
    try:
        for ids in batches:
            output: Any = model(**shard({"input_ids": torch.from_numpy(ids)}, plan, mesh.rank))
            output.loss.backward()
            losses.append(output.loss.item())
            parts.append(output.aux_loss.item())
    except ValueError as error:
        said = str(error)
    attached.detach()
    gradients = {name: as_array(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses, "aux": parts, "gradients": gradients, "said": said}


def trained_gradients(mesh: Mesh, *, config: dict[str, Any]) -> dict[str, Any]:
    """Do one training step; return its losses, what it measured, and the whole gradients before the optimizer."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    gradients: dict[str, Any] = {}

    def noted(*_: Any) -> None:
        for name, parameter in trainer.hf_model.named_parameters():
            gradient: Tensor = parameter.grad
            gradients[name] = as_array(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)

    trainer.optimizer.register_step_pre_hook(noted)
    result = trainer.step(Observed(measured=True))
    trainer.close()
    found = {"loss": result.loss, "router_loss": result.router_loss, "values": result.values()}
    return found | {"gradients": gradients, "experts": trainer.hf_model.config._experts_implementation}
