"""What commands print fits 80 columns of a terminal, every word whole, and is one line for each row in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsering import cli
from sparsering.planner.plan import load_plan
from sparsering.runtime.run.execute import RunResult
from sparsering.runtime.run.rank import report
from sparsering.runtime.run.verify import Verdict
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from sparsering.traces.timeline import Timeline

COLUMNS = 80
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
VERBS = {
    "inspect": ("inspect", "trace"),
    "plan": ("plan", "--trace", "trace", "--cluster", "h100-nvlink-8", "-o", "again.json", "--evaluator", "recurrence",
             "--layout", "gather", "--placement", "striped"),
    "check": ("check", "plan.json"),
    "simulate": ("simulate", "plan.json", "--trace", "trace", "--cluster", "local-cpu-4"),
    "compare": ("compare", "a.json.gz", "b.json.gz"),
    "validate": ("validate", "fidelity.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace, a plan, two timelines and a benchmark's result."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = SyntheticSettings(seq_len_tokens=8192, block_size=128, heads=4, columns=70, density=0.2)
        write_synthetic_trace(Path("trace"), "skewed", settings, layers=3, steps=2, kv_heads=2, head_dim=64)
        made = ("plan", "--trace", "trace", "--cluster", "local-cpu-4", "-o", "plan.json", "--backend", "blockwise")
        assert CliRunner().invoke(cli.app, [*made, "--dtype", "float32", "--layout", "ring"]).exit_code == 0
        for name, jitter in (("a.json.gz", "0"), ("b.json.gz", "0.3")):
            simulated = [*VERBS["simulate"], "-o", name, "--jitter", jitter]
            assert CliRunner().invoke(cli.app, simulated).exit_code == 0
        rows = [{"configuration": name, "direction": "step", "measured_us": 1e6, "predicted_us": 1e6 * off,
                 "measured_bytes": 9e8, "predicted_bytes": 1e9, "spread": 0.01, "calibration": False}
                for name, off in (("one", 1.02), ("two", 0.9), ("three", 1.2))]  # fmt: skip
        document = {"benchmark": "fidelity", "command": "", "date": "2026-01-01T00:00:00Z", "hardware": "x",
                    "versions": {}, "rows": rows}  # fmt: skip
        Path("fidelity.json").write_text(json.dumps(document))
    return folder


def on_a_terminal(*arguments: str) -> str:
    """Return what a command prints on a terminal of 80 columns, without escape codes."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "sparsering.cli", *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        parts = []
        while part := _read(ours):
            parts.append(part)
        _, problems = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0, problems.decode()
    assert problems == b"", "progress is for a terminal on standard error alone"
    return ESCAPES.sub("", b"".join(parts).decode()).replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end was closed
        return b""


def words(text: str) -> Counter[str]:
    return Counter(word for word in text.split() if set(word) != {"─"})


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_cut_or_broken(verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    piped = CliRunner().invoke(cli.app, list(VERBS[verb]))
    assert piped.exit_code == 0, piped.output
    assert "\x1b" not in piped.stdout and "…" not in piped.stdout
    shown = on_a_terminal(*VERBS[verb])
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= COLUMNS
    assert words(shown) == words(piped.stdout), "every header and cell, whole"


def test_a_row_is_a_line_in_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    lines = CliRunner().invoke(cli.app, list(VERBS["compare"])).stdout.splitlines()
    assert lines[0].startswith("B takes ")
    header = next(line for line in lines if line.startswith("phase "))
    assert header.split()[:5] == ["phase", "compute", "A", "compute", "B"]
    rows = [line for line in lines if re.match(r" *\d+ ", line)]
    assert len(rows) == 4 + 5, "phases of a ring of four ranks, forward and backward"
    assert {len(row) for row in rows} == {len(header)}, "columns are under each other"
    candidates = CliRunner().invoke(cli.app, list(VERBS["plan"])).stdout.splitlines()
    (picked,) = [line for line in candidates if line.startswith("→")]
    assert "picked" in picked


def test_a_run_says_what_it_took_and_whether_it_is_right(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, timeline = load_plan(folder / "plan.json"), Timeline.load(folder / "a.json.gz")
    verdicts = [
        Verdict(name=name, rank=0, error=error, plain_error=None) for name, error in (("out", 1e-9), ("dq", 1e-3))
    ]
    result = RunResult(timeline=timeline, step_times_us=[2e3, 1e3, 3e3], verdicts=verdicts, peak_bytes=[1 << 30])
    report(plan, result, None, False)
    told = capsys.readouterr().out
    assert told.startswith("One layer, forward and backward, took 2.000 ms on 4 ranks")
    assert "from 1.000 ms to 3.000 ms" in told and "WRONG against a float64 reference" in told
    assert re.search(r"^out .* ok$", told, re.MULTILINE) and re.search(r"^dq .* FAILED$", told, re.MULTILINE)
