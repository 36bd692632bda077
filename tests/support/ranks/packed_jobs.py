"""A job for rank_pool.py that plays one layer whose pattern the plan's selector chooses for packed documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rank_jobs import as_array, global_tensors
from sparsering.planner.plan import Plan
from sparsering.runtime.attention.bound import bind
from sparsering.runtime.attention.patterns import PlannedChoice
from sparsering.runtime.attention.planned import PlannedAttention
from sparsering.runtime.comm.mesh import Mesh


def chosen(mesh: Mesh, *, plan: Plan, documents: np.ndarray, seed: int) -> dict[str, Any]:
    """Return this rank's out, lse, dq, dk, dv under a mask that all ranks choose and then agree on."""
    bound = bind(plan, mesh)
    planned, choice = PlannedAttention(bound), PlannedChoice(bound)
    choice.documents = torch.from_numpy(documents).int()
    model = plan.model
    tensors = global_tensors(
        bound.placement.padded_tokens, (model.heads, model.kv_heads), model.head_dim, seed=seed, batch=1
    )
    q, k, v, grad_out = (tensor[:, bound.own_positions].contiguous() for tensor in tensors)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out, lse = planned.with_lse(q, k, v, choice.of_layer(0), layer=0)
    out.backward(grad_out)
    planned.agree_on_patterns()
    results = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: as_array(value) for name, value in results.items() if value is not None}
