"""Timelines for Holistic Trace Analysis: hand-worked numbers, from the files, and from HTA itself where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsering.cli import app
from sparsering.traces.errors import InputError
from sparsering.traces.exporting.hta import write_hta
from sparsering.traces.files import read_json
from sparsering.traces.timeline import Span, Timeline

SPANS_US = {  # rank: (stream, start, end); the fractions round to whole microseconds
    0: (("compute", 0.2, 99.8), ("compute", 150.0, 250.0), ("ring", 50.0, 200.0)),
    1: (("compute", 0.0, 40.0), ("compute", 60.0, 100.0), ("ring", 120.0, 160.0)),
}
# Of rank 0, 0 to 250: computing 100 + 100, alone on the link 100 to 150; of the transfer's 150, 50 + 50 are covered.
# Of rank 1, 0 to 160: computing 40 + 40, sending 40, nothing from 40 to 60 and from 100 to 120.
IDLE_US, COMPUTE_US, OTHER_US, ALL_US, COVERED_PERCENT = [0, 40], [200, 80], [50, 40], [250, 160], [66.67, 0.0]


def timeline() -> Timeline:
    spans = [
        Span(
            rank=rank, stream=stream, name="8 tasks", category="compute" if stream == "compute" else "kv",
            direction="forward", phase=number, start_us=start, duration_us=end - start,
        )
        for rank, own in SPANS_US.items()
        for number, (stream, start, end) in enumerate(own)
    ]  # fmt: skip
    return Timeline(source="simulated", world_size=2, spans=tuple(spans))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hta(timeline(), tmp_path / "hta")
    return tmp_path / "hta"


def events(folder: Path, rank: int, category: str) -> list[dict[str, Any]]:
    document = read_json(folder / f"rank-{rank:05d}.json.gz")
    assert document["distributedInfo"]["rank"] == rank
    return [event for event in document["traceEvents"] if event.get("cat") == category]


def microseconds(kernels: list[dict[str, Any]], *, transfers: bool) -> set[int]:
    """Return the whole microseconds in which any of the kernels runs."""
    chosen = [kernel for kernel in kernels if kernel["name"].startswith("nccl") == transfers]
    return {us for kernel in chosen for us in range(kernel["ts"], kernel["ts"] + kernel["dur"])}


@pytest.mark.parametrize("rank", SPANS_US)
def test_files_hold_the_hand_worked_times(folder: Path, rank: int) -> None:
    kernels = events(folder, rank, "kernel")
    computing, sending = microseconds(kernels, transfers=False), microseconds(kernels, transfers=True)
    busy = computing | sending
    length = max(busy) + 1 - min(busy)
    assert (length, length - len(busy)) == (ALL_US[rank], IDLE_US[rank])
    assert (len(computing), len(busy - computing)) == (COMPUTE_US[rank], OTHER_US[rank])
    assert round(100 * len(computing & sending) / len(sending), 2) == COVERED_PERCENT[rank]


def test_every_kernel_has_a_launch_that_nothing_waits_for(folder: Path) -> None:
    for rank in SPANS_US:
        launches = {event["args"]["correlation"]: event for event in events(folder, rank, "cuda_runtime")}
        free: dict[int, int] = {}
        for kernel in events(folder, rank, "kernel"):
            launch, stream = launches.pop(kernel["args"]["correlation"]), kernel["args"]["stream"]
            assert launch["ts"] <= kernel["ts"]
            assert launch["ts"] <= free.get(stream, kernel["ts"])
            assert "stream" not in launch["args"] and stream > 0
            free[stream] = kernel["ts"] + kernel["dur"]
        assert launches == {}


def test_the_rank_is_found_as_hta_searches_it(folder: Path) -> None:
    import gzip

    for rank in SPANS_US:
        lines = gzip.decompress((folder / f"rank-{rank:05d}.json.gz").read_bytes()).decode().splitlines()
        assert next(line for line in lines if '"rank":' in line).strip() == f'"rank": {rank},'


def test_nothing_is_written_beside_other_files(folder: Path) -> None:
    with pytest.raises(InputError, match="is not empty: it holds"):
        write_hta(timeline(), folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["hta"]
    assert len(list(folder.iterdir())) == 2


def test_the_verb_writes_a_file_per_rank(tmp_path: Path) -> None:
    timeline().save(tmp_path / "timeline.json.gz")
    (tmp_path / "out").mkdir()
    arguments = ["export", str(tmp_path / "timeline.json.gz"), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [Path(name).is_file() for name in json.loads(done.stdout)["files"]] == [True, True]
    refused = CliRunner().invoke(app, [*arguments[:-1], "--format", "htaa"])
    assert refused.exit_code == 2
    assert refused.stderr == "sparsering: --format: 'htaa' is not one of hta; did you mean 'hta'?\n"


def test_holistic_trace_analysis_finds_the_hand_worked_times(folder: Path) -> None:
    analysis = pytest.importorskip("hta.trace_analysis").TraceAnalysis(trace_dir=str(folder))
    found = analysis.get_temporal_breakdown(visualize=False).sort_values("rank")
    names = ("idle_time(us)", "compute_time(us)", "non_compute_time(us)", "kernel_time(us)")
    assert [list(found[name]) for name in names] == [IDLE_US, COMPUTE_US, OTHER_US, ALL_US]
    covered = analysis.get_comm_comp_overlap(visualize=False).sort_values("rank")
    assert list(covered["comp_comm_overlap_pctg"]) == COVERED_PERCENT
    idle, _ = analysis.get_idle_time_breakdown(ranks=[0, 1], visualize=False, consecutive_kernel_delay=30)
    told = {(row.rank, row.stream, row.idle_category): row.idle_time for row in idle.itertuples()}
    assert {place: us for place, us in told.items() if us} == {(0, 7, "other"): 50, (1, 7, "kernel_wait"): 20}
    kinds, _ = analysis.get_gpu_kernel_breakdown(visualize=False)
    assert dict(zip(kinds["kernel_type"], kinds["sum"], strict=True)) == {
        "COMPUTATION": 180, "COMMUNICATION": 90, "COMPUTATION overlapping COMMUNICATION": 100,  # each alone, and both
    }  # fmt: skip
