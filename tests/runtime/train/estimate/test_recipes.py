"""The configurations of `examples/`: they are read, and take what the page beside them is there for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsering.cli import app

EXAMPLES = Path(__file__).parents[4] / "examples"
TOKENS = 1_048_576


@pytest.mark.slow
def test_a_million_tokens_fit_eight_gpus(tmp_path: Path) -> None:
    trace, config = tmp_path / "trace", EXAMPLES / "qwen3-8b-1m/train.yaml"
    drawn = ["synthesize", "vertical-slash", "--heads", "32", "--kv-heads", "8", "--seq-len", str(TOKENS), "--density",
             "0.063", "--layers", "36", "-o", str(trace)]  # fmt: skip
    asked = ["estimate", str(config), "--cluster", "h100-nvlink-8", "--trace", str(trace), "--layers", "1", "--json"]
    for arguments in (drawn, asked):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    planned, dense = json.loads(result.output)["arms"]
    assert (planned["attention"], dense["attention"]) == ("planned", "dense-zigzag")
    assert 30e9 < planned["memory_bytes_per_rank"]["total"] < 60e9
    assert planned["step_us"] < dense["step_us"] / 4
