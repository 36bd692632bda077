"""Backends against the definition, for one case: out, lse and all gradients."""

from __future__ import annotations

import torch

from dense_definition import attend
from element_cases import ElementCase
from sparsering.kernels.api import full_attention

TOLERANCE = 1e-10


def check_backend(case: ElementCase, backend: str) -> None:
    """Assert that a backend gives what the definition does, in float64."""
    wanted, given = attend(case.attended, case.given), case.given
    leaves = {"dq": given.q, "dk": given.k, "dv": given.v}
    if given.sinks is not None:
        leaves["dsinks"] = given.sinks
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out, lse = full_attention(
        leaves["dq"], leaves["dk"], leaves["dv"], case.mask, scale=given.scale, backend=backend, softcap=given.softcap,
        sinks=leaves.get("dsinks"),
    )  # fmt: skip
    found = {"out": out.detach(), "lse": lse}
    found |= dict(zip(leaves, torch.autograd.grad((out * given.grad_out).sum(), list(leaves.values())), strict=True))
    for name, value in wanted.items():
        same = found[name] == value  # also where both are minus infinity
        error = torch.where(same, 0.0, (found[name] - value).abs())
        assert float(error.max()) <= TOLERANCE, f"{backend}, {name}: off by {float(error.max())}"
