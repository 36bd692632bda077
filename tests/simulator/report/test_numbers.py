"""Waterfalls and training runs, worked by hand."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from report_files import DENSE, METRICS_LINE, write_metrics
from sparsering.simulator.report.training import TrainingRun, metrics_lines, run_rows, training_runs
from sparsering.simulator.report.waits import waits_of
from sparsering.traces.errors import InputError
from sparsering.traces.timeline import Span, Timeline


def span(rank: int, stream: str, direction: str, start_us: float, end_us: float) -> Span:
    category = "compute" if stream == "compute" else "kv"
    return Span(rank=rank, stream=stream, name="x", category=category, direction=direction, phase=0,
                start_us=start_us, duration_us=end_us - start_us)  # fmt: skip


def test_a_waterfall_by_hand() -> None:
    spans = (
        span(0, "compute", "forward", 10, 30),
        span(0, "kv", "forward", 20, 45),  # hidden to 30, exposed to 45
        span(0, "compute", "forward", 50, 60),  # 45 to 50: nothing is under way
        span(0, "compute", "backward", 80, 110),  # 60 to 80: done with forward
        span(1, "compute", "forward", 10, 80),
        span(1, "compute", "backward", 80, 90),
        span(1, "kv", "backward", 85, 100),  # exposed from 90
    )  # 100 to 110: done
    waits = waits_of(Timeline(source="simulated", world_size=2, spans=spans))
    assert astuple(waits) == pytest.approx(((30 + 70) / 2, (30 + 10) / 2, (15 + 10) / 2, (20 + 10) / 2, (5 + 0) / 2))
    assert waits.total_us == 100


def test_a_rank_without_work_waits_for_all_others() -> None:
    spans = (span(0, "compute", "forward", 0, 40),)
    waits = waits_of(Timeline(source="measured", world_size=2, spans=spans))
    assert (waits.forward_us, waits.waiting_us, waits.total_us) == (20, 20, 40)


def one_run(folder: Path) -> TrainingRun:
    files = {path: metrics_lines(path) for path in sorted(folder.iterdir())}
    (run,) = training_runs(files)
    return run


def test_gpu_hours_are_of_the_slowest_rank_and_of_all_steps(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", ranks=4, steps=(0, 2, 4), step_time_us=2e6)
    write_metrics(tmp_path / "run", ranks=1, steps=(0, 2, 4), step_time_us=1e6)  # rank 0 alone is quicker
    run = one_run(tmp_path / "run")
    assert (run.ranks, run.steps, len(run.lines)) == (4, 5, 3)
    assert run.gpu_hours == pytest.approx(5 * 2 * 4 / 3600)
    assert run.attention_us == pytest.approx((376.595646 + 294.685395) * 1e3)


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", ranks=1, steps=(0, 1, 2, 1, 2), step_time_us=3.6e9)
    assert one_run(tmp_path / "run").gpu_hours == pytest.approx(3.0)


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "run", ranks=1, steps=(0, 1)) / "rank-00000.jsonl"
    path.write_text(path.read_text() + '{"rank": 0, "st')
    assert [line.step for line in metrics_lines(path)] == [0, 1]


def test_a_wrong_line_names_file_line_and_field(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "run", ranks=1, steps=(0, 1)) / "rank-00000.jsonl"
    path.write_text(path.read_text().replace('"step": 1', '"step": "soon"'))
    with pytest.raises(InputError, match=r"rank-00000.jsonl: line 2: step: .*'soon'"):
        metrics_lines(path)


def test_dense_runs_are_told_from_sparse_ones(tmp_path: Path) -> None:
    values: dict[str, Any] = {"loss": None, "exposed_communication_ms": None}
    write_metrics(tmp_path / "dense", **DENSE, **values)
    write_metrics(tmp_path / "sparse")
    dense, sparse = (one_run(tmp_path / name) for name in ("dense", "sparse"))
    assert (dense.sparse, sparse.sparse) == (False, True)
    rows = run_rows([dense, sparse])
    assert [(row["attention"], row["exposed_ms"]) for row in rows] == [
        ("dense", None), ("sparse", METRICS_LINE["exposed_communication_ms"]),
    ]  # fmt: skip
    assert rows[0]["loss"] is None
