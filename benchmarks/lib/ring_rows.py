"""Rows of benchmarks/ring.py: their fields, their table, and the random tensors they were measured on."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ...planner.plan import ModelShape
from ...runtime.comm.mesh import Mesh
from .ring_timing import Figures


def make_row(
    arguments: argparse.Namespace, mesh: Mesh, impl: str, layout: str, figures: Figures, *, model: ModelShape
) -> dict[str, Any]:
    """Return what every row says; those of dense rings say no more. arguments: see ring.py."""
    return {
        "impl": impl,
        "layout": layout,
        "transport": "p2p",
        "world_size": mesh.world_size,
        "nodes": 2 if arguments.two_nodes else 1,
        "seq_len": arguments.seq_len,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "dtype": "float32" if arguments.toy else "bfloat16",
        "mask": "dense",
        "placement": "zigzag",
        "density": 1.0,
        "columns": 0,
        "seed": arguments.seed,
        "forward_ms": figures.forward_ms,
        "backward_ms": figures.backward_ms,
        "step_ms": figures.step_ms,
        "peak_bytes": figures.peak_bytes,
    }


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
