"""Calibrating on CPUs: what is measured becomes a cluster file that plans and simulations use; it can go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rank_pool import RankPool
from sparsering.cli import app
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.cost.kernels import DatasheetCost
from sparsering.planner.cost.measured import MeasuredCost, cluster_cost
from sparsering.planner.specs import ModelShape
from sparsering.runtime.calibrate import cluster_file, measuring
from sparsering.runtime.calibrate.cases import calibration_cases
from sparsering.runtime.calibrate.machine import Rates
from sparsering.runtime.calibrate.points import Times, repeats_of
from sparsering.runtime.calibrate.raw import RawPoints
from sparsering.runtime.comm.mesh import is_rank
from sparsering.traces.errors import InputError
from sparsering.traces.files import read_json

MODEL = ModelShape(layers=1, heads=2, kv_heads=1, head_dim=16)
GIVEN = ["calibrate", "--cluster", "local-cpu-4", "--heads", "2:1", "--head-dim", "16", "--block-size", "16",
         "--backend", "blockwise", "--device", "cpu", "--longest-tokens", "1024"]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "here.yaml"
    before = dict(os.environ)
    done = CliRunner().invoke(app, [*GIVEN, "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "blockwise forward" in done.stdout and str(path) in done.stdout
    assert dict(os.environ) == before and not is_rank(), "what this process does later is no rank's work"
    return path


def test_the_file_prices_launches_of_what_was_measured_alone(calibrated: Path) -> None:
    cluster = load_cluster(calibrated)
    assert cluster.calibration is not None
    assert cluster.origin == "datasheet", "its links were not measured"
    kinds = {(table.direction, table.listed, table.documents) for table in cluster.calibration.tables}
    assert kinds == {(way, listed, packed) for way in ("forward", "backward") for listed in (0, 1) for packed in (0, 1)}
    given: dict[str, Any] = {"block_size": 16, "dtype": "float32", "backend": "blockwise"}
    assert isinstance(cluster_cost(cluster, MODEL, **given), MeasuredCost)
    wider = MODEL.model_copy(update={"head_dim": 32})
    assert isinstance(cluster_cost(cluster, wider, **given), DatasheetCost), "of another head dim nothing was measured"
    assert isinstance(cluster_cost(cluster, MODEL, block_size=16, dtype="bfloat16", backend="blockwise"), DatasheetCost)


def test_it_goes_on_where_it_was_stopped(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = read_json(calibrated.with_suffix(".points.json"))
    assert len(raw["entries"]) == len(calibration_cases(longest_tokens=1024, joins_keys=False))
    raw["entries"] = raw["entries"][:-3]
    points = RawPoints(path=calibrated.with_suffix(".points.json"), facts=raw["facts"], entries=raw["entries"])
    points.save()
    measured = []
    true_measure = measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda *given: measured.append(given) or true_measure(*given))
    done = CliRunner().invoke(app, [*GIVEN, "-o", str(calibrated)])
    assert done.exit_code == 0, done.output
    assert len(measured) == 3


def test_points_of_another_machine_are_not_mixed_in(calibrated: Path) -> None:
    facts = read_json(calibrated.with_suffix(".points.json"))["facts"]
    with pytest.raises(InputError, match="of another machine or of other versions"):
        RawPoints.open(calibrated.with_suffix(".points.json"), facts | {"device": "another"})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--heads", "3:2", "-o", "x.yaml"], "'3:2' is not query and K/V heads"),
        (["--backend", "cuda", "-o", "x.yaml"], "'cuda'"),
        (["-o", "x.json"], "must end in .yaml"),
        (["--cluster", "nowhere", "-o", "x.yaml"], "no such file or preset"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(app, [*GIVEN, *arguments])
    assert done.exit_code == 2 and done.stdout == ""
    assert told in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_links_between_two_processes(calibrated: Path, tmp_path: Path) -> None:
    """Launches that were measured are not measured again: their points lie beside the file to be written."""
    shutil.copy(calibrated.with_suffix(".points.json"), tmp_path / "two.points.json")
    command_line = [sys.executable, "-m", "sparsering.cli", *GIVEN, "--gpus", "2", "-o", str(tmp_path / "two.yaml")]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert load_cluster(tmp_path / "two.yaml").origin == "measured"
    found, base = load_cluster(tmp_path / "two.yaml").intra_node, load_cluster("local-cpu-4").intra_node
    (link,) = read_json(tmp_path / "two.points.json")["links"]
    assert link["transport"] == "p2p" and all(us > 0 for us in link["microseconds"])
    assert found.bandwidth_bytes_per_us > 0 and found.bandwidth_bytes_per_us != base.bandwidth_bytes_per_us


def test_two_ranks_measure_the_host_of_a_layer_together(rank_pools: Callable[[int], RankPool]) -> None:
    for forward_us, backward_us in rank_pools(2).run("channel_jobs.host_of_a_layer"):
        assert forward_us > 0 and backward_us > 0


def test_a_gpus_peak_stays_and_a_slower_gpus_file_is_refused() -> None:
    gpu = load_cluster("h100-nvlink-8").gpu
    rates = Rates(memory_bytes_per_us=3e6, flops_per_us=0.8 * gpu.peak_flops_per_us, host_bytes_per_us=5e4)
    facts = {"device": "NVIDIA H100"}
    found = cluster_file.gpu_of(gpu, facts, rates, {})
    assert found.peak_flops_per_us == gpu.peak_flops_per_us and found.host_bandwidth_bytes_per_us == 5e4
    assert found.matmul_efficiency == pytest.approx(0.95 * 0.8)
    with pytest.raises(InputError, match=r"gpu\.peak_flops_per_us: .* is less than a product reached here"):
        cluster_file.gpu_of(gpu, facts, replace(rates, flops_per_us=1.01 * gpu.peak_flops_per_us), {})


def test_launches_are_repeated_while_the_host_stays_ahead() -> None:
    long, short = Times(device_us=20_000.0, host_us=500.0), Times(device_us=100.0, host_us=400.0)
    assert repeats_of(long) == 7  # 150 ms
    assert repeats_of(short) == 17  # the host falls 0.7 ms behind with each, of 12 that the device sleeps
    assert repeats_of(Times(device_us=900.0, host_us=100.0)) == 166
    assert repeats_of(Times(device_us=1.0, host_us=0.1)) == 400
