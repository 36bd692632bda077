"""The verb `sparsering audit`: is this model right when its sequence is split over ranks?"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...planner.schedule.backends import BACKENDS, computed_head_dim
from ...traces.errors import UnsupportedError

if TYPE_CHECKING:
    from ..audit.result import Audit


def audit(
    model: Annotated[Path, typer.Argument(help="Model folder, or a config.json; weights are not read.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of the sequences that will be split.")] = 8192,
    fresh: Annotated[bool, typer.Option("--fresh", help="Audit anew, whatever was found before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON.")] = False,
) -> None:
    """Say whether a model is right over several ranks: the gate that capture, attach and train ask (needs torch).

    Takes seconds on a CPU. A small copy (same class and settings, every kind of layer, narrow, random weights) runs
    alone and split in two, dense, in float64: loss, logits and all gradients must agree to 1e-6. Exit code 2, and the
    reason in one line, for a model that would be computed wrongly.
    """
    from ..audit import audit as gate
    from ..model.load import read_config

    _, config = read_config(model)
    found = gate.audit(config, seq_len_tokens=seq_len, cache=None if fresh else gate.CACHE)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"kernels": _kernels(found)}))
    elif found.right:
        shape = ", ".join(f"{value} {name}" for name, value in (found.shape or {}).items())
        worst = max(error for road in found.errors.values() for error in road.values())
        typer.echo(
            f"right: {found.model_class} at {found.seq_len_tokens:,} tokens ({shape})\n"
            f"a small copy ({found.layers} layers, {found.parameters:,} parameters), alone and split in two: loss, "
            f"logits and gradients agree to {worst:.1e} ({found.seconds:.1f} s)\n"
            f"kernels: {', '.join(f'{name} {told}' for name, told in _kernels(found).items())}"
        )
    found.require(source=model)


def _kernels(found: Audit) -> dict[str, str]:
    """Say of every backend whether it takes the model's heads, in bfloat16 and blocks of 128."""
    head_dim = (found.shape or {}).get("head_dim")
    if head_dim is None:
        return {}
    told = dict.fromkeys(BACKENDS, "no")
    for backend in BACKENDS:
        with suppress(UnsupportedError):
            computed = computed_head_dim(backend, head_dim=head_dim, dtype="bfloat16", block_size=128)
            told[backend] = "yes" if computed == head_dim else f"padded to {computed}"
    return told
