"""The verb `doctor`. Only `--kernels` needs torch; without it, doctor says what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .diagnosis import diagnose
from .page import page, verdict


def doctor(
    context: typer.Context,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Check every kind of problem on this GPU against float64.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="With --kernels: time the launch settings too, and write the fastest.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where --tune writes; `sparsering plan --launches` reads it.")
    ] = Path("launches.json"),
    backend: Annotated[str, typer.Option(help="With --kernels: triton or flash4.")] = "triton",
    seq_len_tokens: Annotated[int, typer.Option("--seq-len", help="Tokens to tune for.")] = 131072,
    density: Annotated[float, typer.Option(help="Share of active blocks to tune for.")] = 0.05,
    heads: Annotated[int, typer.Option(help="Query heads to tune for.")] = 16,
    kv_heads: Annotated[int, typer.Option(help="K/V heads to tune for.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Head dim to tune for.")] = 128,
    block_size: Annotated[int, typer.Option(help="Mask block to tune for.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what this machine has, which verbs work on it, and the command that mends what does not.

    Python, torch, Triton and whether they fit each other, GPUs and how they are joined, NCCL, memory and disk. Every
    kernel backend is tried forward and backward on a small problem against the reference. With --kernels, one backend
    is checked on all shapes that the kernels promise: errors at most twice those of plain torch in the same data type.
    Exit code 0 where nothing is broken, also if something is not installed; 1 where something is.
    """
    if kernels:
        from .kernel_check import examine

        shape = {
            "seq_len_tokens": seq_len_tokens, "density": density, "heads": heads, "kv_heads": kv_heads,
            "head_dim": head_dim, "block_size": block_size,
        }  # fmt: skip
        raise typer.Exit(examine(backend, tune=tune, output=output, as_json=as_json, shape=shape))
    if tune:
        raise typer.BadParameter("needs --kernels", param_hint="--tune")
    found = diagnose(context.obj["verb_modules"](), Path())
    typer.echo(json.dumps(asdict(found) | {"verdict": verdict(found)}) if as_json else page(found))
    if found.broken:
        raise typer.Exit(1)
