"""Measured values with predictions: result files, timelines, and the verb that judges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from sparsering import cli
from sparsering.traces.timeline import COMPUTE_STREAM, Span, Timeline

WORKLOAD = {"seq_len": 4096, "heads": 8, "world_size": 4}
# (measured, predicted) of five alternatives for one workload. Errors: -10 %, +20 %, 0, -4 %, +50 %.
ALTERNATIVES = {"a": (100.0, 90.0), "b": (110.0, 132.0), "c": (120.0, 120.0), "d": (125.0, 120.0), "e": (200.0, 300.0)}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["validate", *map(str, arguments)])


def fidelity(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"benchmark": "fidelity", "rows": list(rows)}


def steps(**changes: Any) -> list[dict[str, Any]]:
    return [
        {"configuration": name, "direction": "step", "measured_us": us, "predicted_us": predicted, "spread": 0.01}
        | WORKLOAD | changes
        for name, (us, predicted) in ALTERNATIVES.items()
    ]  # fmt: skip


def written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def timeline(
    source: str, computes: dict[tuple[str, int, int], tuple[float, float]], digest: str = "ab" * 32
) -> Timeline:
    """Compute by (direction, rank, phase): when it starts, how long it takes."""
    spans = [
        Span(rank=rank, stream=COMPUTE_STREAM, name="x", category="compute", direction=direction, phase=phase,
             start_us=start, duration_us=us)
        for (direction, rank, phase), (start, us) in computes.items()
    ]  # fmt: skip
    return Timeline(source=source, world_size=2, spans=tuple(spans), metadata={"plan_digest": digest})


MEASURED = {("forward", 0, 0): (0.0, 10.0), ("forward", 1, 0): (0.0, 20.0), ("backward", 0, 0): (20.0, 30.0)}
SIMULATED = {("forward", 0, 0): (0.0, 11.0), ("forward", 1, 0): (0.0, 18.0), ("backward", 0, 0): (18.0, 33.0),
             ("backward", 1, 1): (18.0, 5.0)}  # fmt: skip
