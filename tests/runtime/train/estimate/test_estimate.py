"""`sparsering estimate` on a small model: what it says adds up, and follows configuration, patterns and cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sparsering.cli import app
from sparsering.planner.cost.cluster import PRESETS
from sparsering.runtime.train.estimate.attention import evenly_spaced
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from sparsering.traces.yaml_files import yaml_text
from train_runs import write_model

TOKENS, LAYERS = 16384, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's configuration and traces of two densities; there are no data and no weights."""
    folder = tmp_path_factory.mktemp("estimate")
    write_model(folder / "model", max_position_embeddings=TOKENS)
    for name, density in (("sparse", 0.05), ("denser", 0.4)):
        drawn = SyntheticSettings(seq_len_tokens=TOKENS, heads=4, block_size=128, columns=64, density=density)
        write_synthetic_trace(folder / name, "vertical-slash", drawn, layers=LAYERS, kv_heads=2, head_dim=8)
    return folder


def written(folder: Path, name: str, **changes: Any) -> str:
    document = {
        "model": {"path": "model", "random_weights": True}, "data": {"folder": "nowhere"}, "seq_len_tokens": TOKENS,
        "steps": 100, "parallel": {"context": 2},
        "plan": {"pattern": {"selector": "vertical-slash", "settings": {"columns": 64, "slashes": 64}}},
    } | changes  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml_text(document))
    return str(folder / f"{name}.yaml")


def estimated(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["estimate", *arguments, "--cluster", "h100-nvlink-8"])


def arms(*arguments: str) -> list[dict[str, Any]]:
    done = estimated(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["arms"]


def test_what_is_said_adds_up(folder: Path) -> None:
    config = written(folder, "plain")
    sparse, dense = arms(config, "--trace", str(folder / "sparse"), "--choosing-ms", "0.5")
    for arm in (sparse, dense):
        assert arm["step_us"] == pytest.approx(sum(part["us"] for part in arm["parts"]))
        assert arm["tokens_per_s"] == pytest.approx(TOKENS / arm["step_us"] * 1e6)
        assert arm["gpu_hours"] == pytest.approx(arm["step_us"] * 100 * 2 / 3.6e9)
        memory = arm["memory_bytes_per_rank"]
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert sparse["attention"] == "planned" and dense["attention"] == "dense-zigzag"
    parts = {part["name"]: part for part in sparse["parts"]}
    assert parts["choosing patterns"] == {"name": "choosing patterns", "us": LAYERS * 500.0, "basis": "given"}
    shown = estimated(config, "--trace", str(folder / "sparse")).stdout
    assert shown.splitlines()[0].endswith("times as quick as dense attention")
    assert "choosing patterns is left out" in shown and "unvalidated" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_denser_patterns_take_longer_and_the_rest_does_not(folder: Path) -> None:
    config = written(folder, "plain")
    found = {name: arms(config, "--trace", str(folder / name))[0]["parts"] for name in ("sparse", "denser")}
    times = {name: {part["name"]: part["us"] for part in parts} for name, parts in found.items()}
    for name, us in times["sparse"].items():
        if name.startswith("attention"):
            assert times["denser"][name] > us
        else:
            assert times["denser"][name] == us


def test_layers_that_are_kept_whole_save_time_and_take_memory(folder: Path) -> None:
    plain = arms(written(folder, "plain"), "--trace", str(folder / "sparse"))[0]
    whole = arms(written(folder, "whole", memory={"whole_layers": LAYERS}), "--trace", str(folder / "sparse"))[0]
    assert whole["step_us"] < plain["step_us"]
    assert whole["memory_bytes_per_rank"]["total"] > plain["memory_bytes_per_rank"]["total"]


def test_offload_and_pieces_of_the_mlp_take_time_and_save_memory(folder: Path) -> None:
    trace = ["--trace", str(folder / "sparse")]
    write_model(folder / "wide", max_position_embeddings=TOKENS, intermediate_size=4096)
    wide = {"path": "wide", "random_weights": True}
    plain = arms(written(folder, "wide", model=wide), *trace)[0]
    for name, memory, part in (
        ("offload", {"offload": True}, "copies to the host and back"),
        ("tiles", {"mlp_tiles": 8}, "matrices of the layers"),
    ):
        arm = arms(written(folder, name, model=wide, memory=memory), *trace)[0]
        times = [{one["name"]: one["us"] for one in which["parts"]} for which in (plain, arm)]
        assert times[1][part] > times[0].get(part, 0.0)
        assert arm["memory_bytes_per_rank"]["total"] < plain["memory_bytes_per_rank"]["total"], name


def test_offload_needs_the_rate_of_copies(folder: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "unknown.yaml"
    text = (PRESETS / "h100-nvlink-8.yaml").read_text()
    cluster.write_text("\n".join(line for line in text.splitlines() if "host_bandwidth" not in line))
    config = written(folder, "unknown", memory={"offload": True})
    given = ["estimate", str(config), "--cluster", str(cluster), "--trace", str(folder / "sparse")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2 and "gpu.host_bandwidth_bytes_per_us: is needed" in done.stderr


def test_a_dense_run_is_one_arm(folder: Path) -> None:
    (only,) = arms(written(folder, "dense", attention="dense-zigzag", plan={}))
    assert only["attention"] == "dense-zigzag"


def test_layers_are_spread_evenly() -> None:
    assert evenly_spaced(range(36), 4) == [4, 13, 22, 31]
    assert evenly_spaced([3, 5], 4) == [3, 5]
    assert evenly_spaced(range(9), 1) == [4]


@pytest.mark.parametrize(
    ("changes", "trace", "told"),
    [
        ({}, None, "--trace: the run chooses its patterns"),
        ({"seq_len_tokens": 2 * TOKENS}, "sparse", f"the plan is for {2 * TOKENS}, not for {TOKENS}"),
        ({"parallel": {"context": 16}}, "sparse", "parallel: 16 ranks are configured, h100-nvlink-8 has 8 GPUs"),
        ({"model": {"path": "nowhere", "random_weights": True}}, "sparse", "no such model configuration"),
    ],
)
def test_what_has_no_price_is_one_line(folder: Path, changes: dict[str, Any], trace: str | None, told: str) -> None:
    given = ["--trace", str(folder / trace)] if trace else []
    done = estimated(written(folder, "refused", **changes), *given)
    assert done.exit_code == 2 and done.stdout == ""
    assert told in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_choosing_counts_in_the_steps_that_choose(folder: Path) -> None:
    pattern = {"selector": "vertical-slash", "settings": {"columns": 64, "slashes": 64}}
    trace = ("--trace", str(folder / "sparse"), "--choosing-ms", "0.5")
    taken = {}
    for name, choose in (("always", {}), ("seldom", {"every_steps": 3, "until_step": 50})):
        config = written(folder, name, plan={"pattern": pattern, "choose": choose})
        parts = arms(config, *trace)[0]["parts"]
        taken[name] = next(part["us"] for part in parts if part["name"] == "choosing patterns")
    assert taken == {"always": 500 * LAYERS, "seldom": pytest.approx(500 * LAYERS * 17 / 100)}
    told = estimated(written(folder, "told", plan={"pattern": pattern, "choose": {"every_steps": 4}}), *trace)
    assert "patterns are chosen in 25 of 100 steps" in told.output
