"""Planned layers as benchmarks/ring.py and rank.py time them; rows: their fields, their table, their tensors."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...planner.plan import ModelShape, Plan
from ...runtime.attention.bound import bind
from ...runtime.attention.planned import PlannedAttention
from ...runtime.comm.channels import Channel, Channels
from ...runtime.comm.mesh import Mesh
from .masks import density_of
from .ring_plans import Work, name_of, predicted_peak_bytes, transports_of
from .ring_timing import Figures, SilentChannel, time_steps


def make_row(arguments: argparse.Namespace, impl: str, layout: str, figures: Figures) -> dict[str, Any]:
    """Return what every row says; those of dense rings say no more. arguments: see ring_options.py."""
    return {
        "impl": impl,
        "layout": layout,
        "transport": "p2p",
        "world_size": arguments.world_size,
        "seq_len": arguments.seq_len,
        **arguments.model.model_dump(exclude={"layers"}),
        "dtype": arguments.dtype,
        "mask": "dense",
        "placement": "zigzag",
        "density": 1.0,
        "columns": 0,
        "seed": arguments.seed,
        "forward_ms": figures.forward_ms,
        "backward_ms": figures.backward_ms,
        "step_ms": figures.step_ms,
    }


class PlannedLayer:
    """One layer of random tensors on this rank under a plan, to be timed.

    before_bytes: allocated before its inputs and buffers. Making it is collective.
    """

    def __init__(
        self, arguments: argparse.Namespace, plan: Plan, mask: AttentionMask, mesh: Mesh, channels: Channels,
        before_bytes: int,
    ) -> None:  # fmt: skip
        self._given = mesh, arguments.repeats, before_bytes
        self.plan, self.mask, self.bound = plan, mask, bind(plan, mesh)
        self.planned = PlannedAttention(self.bound, channels=channels)
        tokens = self.bound.own_positions.numel()
        self.tensors = random_tensors(plan.model, tokens, mesh, arguments.seed, self.bound.dtype)

    def time(self) -> Figures:
        """Time its steps."""
        return time_steps(lambda q, k, v: self.planned(q, k, v, self.mask), self.tensors, *self._given)

    def time_alone(self) -> Figures:
        """Time its kernels alone, from here on: the same schedule over channels that send nothing."""
        silent: Channel = SilentChannel()
        self.planned.channels = dict.fromkeys(self.planned.channels, silent)
        return self.time()

    def row(self, arguments: argparse.Namespace, work: Work, figures: Figures) -> dict[str, Any]:
        """Return what every row of a planned layer says."""
        return make_row(arguments, f"ours-{self.plan.kernels.backend}", name_of(self.plan), figures) | {
            "transport": transports_of(self.plan),
            "mask": work.family,
            "density": density_of(work.mask),
            "columns": work.columns,
            "plan_digest": self.plan.digest,
        }

    def memory(self, figures: Figures) -> dict[str, Any]:
        """Return a row's memory beside what the plan predicts."""
        predicted = predicted_peak_bytes(self.plan)
        peak = None if figures.peak_bytes is None else figures.peak_bytes + self.planned.pool.uncounted_bytes
        ratio = None if peak is None else peak / predicted
        return {"peak_bytes": peak, "predicted_peak_bytes": predicted, "peak_ratio": ratio}


def random_tensors(model: ModelShape, tokens: int, mesh: Mesh, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a rank's q, k, v (requiring gradients) and grad_out, [1, tokens, heads, D]."""
    generator = torch.Generator(mesh.device).manual_seed(seed + mesh.rank)
    shapes = [(model.heads, True), (model.kv_heads, True), (model.kv_heads, True), (model.heads, False)]
    return [
        torch.randn(1, tokens, heads, model.head_dim, generator=generator, device=mesh.device, dtype=dtype)
        .requires_grad_(gradient)
        for heads, gradient in shapes
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, a heading first."""
    lines = [
        f"{'impl':24}{'mask':11}{'placement':11}{'layout':48}{'density':>8}{'forward':>9}{'backward':>9}{'step':>9}{'alone':>8}"
        f"{'ratio':>7}{'imbal.':>7}{'peak GB':>9}{'/plan':>7}"
    ]
    for row in rows:
        alone = row.get("compute_step_ms", float("nan"))
        peak, ratio = row["peak_bytes"], row.get("peak_ratio")
        lines.append(
            f"{row['impl']:24}{row['mask']:11}{row['placement']:11}{row['layout']:48}{row['density']:8.3f}"
            f"{row['forward_ms']:9.2f}{row['backward_ms']:9.2f}{row['step_ms']:9.2f}"
            f"{alone:8.2f}{row['step_ms'] / alone:7.3f}"
            f"{row.get('imbalance', float('nan')):7.3f}{'-' if peak is None else f'{peak / 1e9:.3f}':>9}"
            f"{'-' if ratio is None else f'{ratio:.3f}':>7}"
        )
    return "\n".join(lines)
