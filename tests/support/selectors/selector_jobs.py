"""A job of tests/support/ranks/rank_pool.py in a process that knows the selector of tests/support/new_selector.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import new_selector as new_selector  # registers it
from model_cases import case_model
from sparsering.planner.plan import Plan
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.hf.attach import attach
from sparsering.runtime.model.shard import shard


def attended(mesh: Mesh, *, name: str, plan: Plan, ids: np.ndarray) -> dict[str, Any]:
    """Return loss, logits with their positions, and gradients of a case under a plan, in float64."""
    model = case_model(name)
    attached = attach(model, plan, mesh)
    output = model(**shard({"input_ids": torch.from_numpy(ids)}, plan, mesh.rank))
    output.loss.backward()
    attached.detach()
    return {
        "loss": output.loss.item(),
        "logits": output.logits.detach().numpy(),
        "positions": plan.make_placement().positions(mesh.rank),
        "gradients": {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None},
    }
