"""What `doctor --kernels` and `--tune` do; they need a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer

BACKENDS = ("triton", "flash4")


def examine(backend: str, *, tune: bool, output: Path, as_json: bool, shape: dict[str, Any]) -> int:
    """Check one backend's kernels, and tune them; return the exit code. Raises typer.BadParameter for bad options."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs an NVIDIA GPU", param_hint="--kernels")
    if backend not in BACKENDS:
        raise typer.BadParameter(f"{backend!r} is neither {' nor '.join(BACKENDS)}", param_hint="--backend")
    if tune and backend != "triton":
        raise typer.BadParameter(f"{backend} has no launch settings of ours", param_hint="--tune")
    from ...kernels.tools.doctor import check_kernels, tune_kernels

    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "backend": backend}
    say = (lambda line: None) if as_json else typer.echo
    found["cases"] = list(check_kernels(backend, say))
    wrong = [row["case"] for row in found["cases"] if row["state"] == "wrong"]
    if tune and not wrong:
        try:
            found |= tune_kernels(shape, output, say)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--tune") from error
    if as_json:
        typer.echo(json.dumps(found))
    return 1 if wrong else 0
