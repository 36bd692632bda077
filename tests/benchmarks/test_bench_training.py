"""benchmarks/training.py on CPUs: every row says what it measured; what cannot run is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsering.benchmarks import training
from sparsering.traces.files import read_json


def _run(benchmark: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-m", f"sparsering.benchmarks.{benchmark}", "--toy", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_planned_and_dense_steps_side_by_side(tmp_path: Path) -> None:
    implementations = ["ours", "ours-dense", "dense-zigzag"]
    arguments = ["--steps", "1", "--density", "0.05", "--seq-len", "1024", "--results", str(tmp_path)]
    done = _run("training", "--impl", *implementations, *arguments)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("training-*.json")
    ours, dense, zigzag = read_json(path)["rows"]
    assert [ours["impl"], dense["impl"], zigzag["impl"]] == [
        "ours-blockwise",
        "ours-dense-blockwise",
        "dense-zigzag-cpu",
    ]
    assert dense["loss"] == pytest.approx(zigzag["loss"], abs=1e-5)
    assert dense["grad_norm"] == pytest.approx(zigzag["grad_norm"], rel=1e-4)
    assert ours["density"] < 0.5 and dense["density"] == zigzag["density"] == 1.0
    for row in (ours, dense, zigzag):
        assert 0 < row["exposed_communication_ms"] < row["attention_ms"] < row["step_ms"]
    assert ours["choosing_ms"] > 0 == zigzag["choosing_ms"]


def test_a_ring_that_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--toy", "--impl", "dense-zigzag-flash4"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        training.main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "training.py: attention: 'dense-zigzag-flash4' needs GPUs\n")
