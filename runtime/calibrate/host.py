"""What the host takes for a layer: a plan for one rank, which sends nothing, is played and timed."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from ...planner.layouts.ring import Ring
from ...planner.plan import Plan, make_plan
from ...planner.specs import AttentionSpec, KernelSpec, PatternSpec
from ..attention.bound import bind
from ..attention.planned import PlannedAttention
from ..comm.mesh import Mesh
from .cases import KINDS
from .points import SLEEP_CYCLES, Case, Drawn, draw
from .raw import Shape

TOKENS, DENSITY, WARMUPS, REPEATS = 16384, 0.05, 3, 9


class LayerHost(NamedTuple):
    """The host's microseconds in a layer's forward and backward of one launch each, everything included."""

    forward: float
    backward: float


def layer_host_us(mesh: Mesh, shape: Shape) -> LayerHost:
    """Play a layer on this rank alone, as every rank does at the same time. Collective: a plan is bound.

    The mask is of diagonals; its index is made anew. Medians.
    """
    mesh = mesh.replica_of(1)
    case = Case(kind=KINDS[0], seq_len_tokens=TOKENS, world_size=1, rank=0, density=DENSITY)
    drawn = draw(case, shape.model, shape.block_size, mesh.device)
    bound = bind(_plan(drawn, shape, "bfloat16" if mesh.device.type == "cuda" else "float32"), mesh)
    planned = PlannedAttention(bound)
    sizes = [(shape.heads, True), (shape.kv_heads, True), (shape.kv_heads, True), (shape.heads, False)]
    q, k, v, grad_out = (
        torch.randn(1, bound.own_positions.numel(), heads, shape.head_dim, device=mesh.device, dtype=bound.dtype)
        .requires_grad_(trained)
        for heads, trained in sizes
    )  # fmt: skip
    found = []
    for _ in range(WARMUPS + REPEATS):
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
        began = time.perf_counter()
        out = planned(q, k, v, drawn.mask)
        between = time.perf_counter()
        out.backward(grad_out)
        found.append((between - began, time.perf_counter() - between))
    return LayerHost(*(1e6 * statistics.median(column) for column in zip(*found[WARMUPS:], strict=True)))


def _plan(drawn: Drawn, shape: Shape, dtype: str) -> Plan:
    attention = AttentionSpec.model_validate(
        {
            "model": shape.model,
            "seq_len_tokens": TOKENS,
            "block_size": shape.block_size,
            "columns_capacity": drawn.mask.column_capacity,
            "dtype": dtype,
        }
    )
    return make_plan(
        attention=attention,
        placement=drawn.placement,
        forward=Ring(),
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec(backend=shape.backend),
    )
