"""Files that `sparsering validate` cannot compare: one line, and exit code 2."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fidelity_cases import MEASURED, fidelity, invoke, steps, timeline
from sparsering.traces.timeline import Timeline

HUGE = 10**400


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not valid JSON"),
        ('{"benchmark": "fidelity", "rows": [{"measured_us": NaN}]}', "NaN is not a number"),
        ("[]", "is neither a result file of a benchmark nor a timeline"),
        ("{}", "is neither a result file of a benchmark nor a timeline"),
        ('{"benchmark": ["ring"]}', "is neither a result file of a benchmark nor a timeline"),
        ('{"benchmark": "kernels", "rows": []}', "benchmark: 'kernels' is not one of ring, rank, fidelity, phases"),
        ('{"benchmark": "ring"}', "rows: must be a list of objects"),
        ('{"benchmark": "ring", "rows": [1]}', "rows: must be a list of objects"),
        ('{"benchmark": "fidelity", "rows": []}', "holds no row with a measured value and its prediction"),
        ('{"benchmark": "ring", "rows": [{"impl": "a", "layout": "b", "forward_ms": 1.0}]}', "holds no row with"),
        ('{"benchmark": "fidelity", "rows": [{"direction": "step"}]}', "rows.0: configuration: is missing"),
        ('{"traceEvents": []}', "is not a timeline of this tool"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    result = invoke(path)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"sparsering: {path}: ") and problem in result.stderr


@pytest.mark.parametrize("name", ["measured_us", "predicted_us"])
@pytest.mark.parametrize("value", [0, 0.0, 5e-324, -1.0, math.inf, HUGE, "1", None, True, [1.0], 1e300])
def test_times_that_cannot_be_are_named(name: str, value: Any, tmp_path: Path) -> None:
    document = json.dumps(fidelity(steps()[0] | {name: value})).replace("Infinity", "1e999")
    (tmp_path / "f.json").write_text(document)
    result = invoke(tmp_path / "f.json")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert f"f.json: rows.0: {name}: " in result.stderr or f"f.json: rows.0.{name}: " in result.stderr


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"m": timeline("measured", MEASURED)}, "m.json: no simulated timeline of its plan"),
        ({"s": timeline("simulated", MEASURED)}, "s.json: no measured timeline of its plan"),
        (
            {"s": timeline("simulated", MEASURED), "t": timeline("simulated", MEASURED)},
            "t.json: is of the same plan as",
        ),
        (
            {"m": timeline("measured", MEASURED), "s": replace(timeline("simulated", MEASURED), world_size=3)},
            "m.json: has 2 ranks",
        ),
        (
            {"m": timeline("measured", MEASURED), "s": timeline("simulated", {("forward", 0, 0): (0.0, 1.0)})},
            "m.json: holds forward and backward",
        ),
        (
            {"m": timeline("measured", {("forward", 0, 0): (0.0, 0.0)}),
             "s": timeline("simulated", {("forward", 0, 0): (0.0, 1.0)})},
            "m.json: forward takes 0 µs",
        ),
        ({"m": timeline("measured", {}), "s": timeline("simulated", {})}, "m.json: spans: the timeline holds no spans"),
        ({"m": replace(timeline("measured", MEASURED), metadata={})}, "m.json: metadata.plan_digest: does not say"),
    ],
)  # fmt: skip
def test_timelines_that_do_not_belong_together_are_refused(
    files: dict[str, Timeline], problem: str, tmp_path: Path
) -> None:
    for name, one in files.items():
        one.save(tmp_path / f"{name}.json")
    result = invoke(*sorted(tmp_path.glob("*.json")))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert problem in result.stderr
