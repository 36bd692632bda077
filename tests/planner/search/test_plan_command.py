"""`sparsering plan` and `sparsering check`, from a trace on disk to a proved plan, and their one-line refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sparsering import cli
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.plan import built_schedule, load_plan
from sparsering.planner.schedule import schedule as schedule_module
from sparsering.planner.schedule.schedule import DIRECTIONS
from sparsering.planner.search.problem import SearchSpace
from sparsering.planner.search.search import plan_trace
from sparsering.simulator.engine import simulate
from sparsering.traces.dataset.manifest import ModelShape, TraceHeader
from sparsering.traces.dataset.rows import HeadChoice
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.errors import InputError, UnsupportedError
from sparsering.traces.files import canonical_json, sha256_of_bytes
from sparsering.traces.synthetic import SyntheticSettings, synthesize, write_synthetic_trace

RUNNER = CliRunner()
SETTINGS = SyntheticSettings(seq_len_tokens=4000, block_size=128, heads=4, columns=70, density=0.2)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("traces") / "vertical-slash"
    return write_synthetic_trace(folder, "vertical-slash", SETTINGS, layers=6, steps=2, kv_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def planned(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A plan file made by the command line, and the document that it printed."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    result = plan(trace, "-o", str(path), "--json")
    assert result.exit_code == 0, result.output
    return path, json.loads(result.stdout)


def plan(trace: Trace, *options: str, cluster: str = "local-cpu-4") -> Result:
    return RUNNER.invoke(cli.app, ["plan", "--trace", str(trace.folder), "--cluster", cluster, *options])


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_the_plan_holds_what_was_printed(trace: Trace, planned: tuple[Path, dict[str, Any]]):
    path, printed = planned
    made = load_plan(path)
    assert printed["digest"] == made.digest
    assert printed["predictions"] == made.predictions
    assert (made.world_size, made.seq_len_tokens, made.block_size, made.dtype) == (4, 4000, 128, "bfloat16")
    assert made.model.model_dump() == {"layers": 6, "heads": 4, "kv_heads": 2, "head_dim": 64}
    assert made.columns_capacity == 128  # 70 columns, rounded up to a multiple of 64
    assert made.pattern.source == "trace"
    assert made.pattern.trace_sha256 == trace.digest()


def test_pulls_may_be_forbidden(trace: Trace, tmp_path: Path):
    def transports(*options: str) -> set[str]:
        path = tmp_path / "-".join(["plan", *options])
        chosen = ("--layout", "gather", "--placement", "striped", "-o", str(path), *options)
        assert plan(trace, *chosen, cluster="h100-nvlink-8").exit_code == 0
        schedules = [load_plan(path).schedule(direction) for direction in DIRECTIONS]
        calls = [call for schedule in schedules for phase in schedule.phases(0) for call in phase.group_calls]
        return {transfer.transport for call in calls for transfer in call.transfers if transfer.kind != "columns"}

    assert transports() == {"pull"}
    assert transports("--no-pulls") == {"p2p"}


def test_predictions_and_provenance_say_where_they_come_from(trace: Trace, planned: tuple[Path, dict[str, Any]]):
    made = load_plan(planned[0])
    told, source = made.predictions, made.provenance
    assert told["evaluator"] == "simulator"
    assert told["sampled_layers"] == [[1, 0], [1, 2], [1, 3], [1, 5]]  # four of the last step, spread evenly
    assert told["step_time_us"] == pytest.approx(told["forward_us"] + told["backward_us"], abs=0.002)
    assert told["memory_bytes"] <= told["memory_limit_bytes"]
    assert {"placement", "granularity_tokens", "layout", "parameters", "executable", "fits_memory", "step_time_us"} <= (
        told["candidates"][0].keys()
    )
    cluster = load_cluster("local-cpu-4")
    assert told["unvalidated"] is (cluster.origin == "datasheet")
    assert source["trace_sha256"] == trace.digest()
    assert source["cluster"] == "local-cpu-4"
    assert source["cluster_sha256"] == sha256_of_bytes(canonical_json(cluster.model_dump(mode="json")))
    assert source["command"].split()[0] == "sparsering"
    assert source["date"].endswith("+00:00")


def test_no_plain_layout_of_the_table_is_quicker(planned: tuple[Path, dict[str, Any]]):
    told = planned[1]["predictions"]
    plain = [row for row in told["candidates"] if row["baseline"] and row["executable"] and row["fits_memory"]]
    assert {row["layout"] for row in plain} == {"gather", "ring"}
    assert told["step_time_us"] <= min(row["step_time_us"] for row in plain)
    assert told["best_baseline_us"] == min(row["step_time_us"] for row in plain)


def test_planning_twice_gives_the_same_plan(trace: Trace):
    cluster = load_cluster("local-cpu-4")
    one, other = (plan_trace(trace, cluster, SearchSpace(layers=(2,)), evaluator=simulate) for _ in range(2))
    assert one.digest == other.digest
    assert one.predictions == other.predictions


def test_tables_for_people(trace: Trace, tmp_path: Path):
    result = plan(trace, "-o", str(tmp_path / "plan.json"), "--evaluator", "recurrence", "--layers", "0")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    made = load_plan(tmp_path / "plan.json")
    assert made.predictions["verdict"] in words
    assert "recurrence" in words
    assert result.stdout.startswith(made.predictions["verdict"]), "the answer comes first"
    assert "lower bound: " in words
    assert result.stdout.endswith(f"see it: sparsering report {tmp_path / 'plan.json'} -o report.html\n")
    assert f"digest {made.digest[:12]}" in words
    assert "times are means over 1 of 12 recorded layers" in words


def test_restrictions_are_kept(trace: Trace, tmp_path: Path):
    options = ("--layout", "ring", "--layout", "hierarchical", "--placement", "zigzag", "--evaluator", "recurrence")
    result = plan(trace, "-o", str(tmp_path / "plan.json"), "--layers", "0", "--steps", "0", *options)
    assert result.exit_code == 0, result.output
    made = load_plan(tmp_path / "plan.json")
    assert made.placement.name == "zigzag"
    assert {made.forward.layout, made.backward.layout} <= {"ring", "hierarchical"}
    assert made.predictions["sampled_layers"] == [[0, 0]]


def test_check_proves_the_plan(planned: tuple[Path, dict[str, Any]]):
    result = RUNNER.invoke(cli.app, ["check", str(planned[0]), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    made = load_plan(planned[0])
    assert printed["digest"] == made.digest
    assert len(printed["proved"]) == 5
    for direction in ("forward", "backward"):
        figures = printed["figures"][direction]
        assert figures["tasks"] == 4 * 4 + 4  # every query and key shard, and the columns of every query shard
        assert figures["peak_bytes"] <= figures["buffer_bytes"] == made.schedule(direction).buffer_bytes
        assert figures["schedule_sha256"] == getattr(made, direction).schedule_sha256
    for_people = RUNNER.invoke(cli.app, ["check", str(planned[0])])
    assert for_people.exit_code == 0
    assert for_people.stdout.count("proved:") == 5


def test_check_refuses_a_plan_whose_schedule_changed(planned: tuple[Path, dict[str, Any]], tmp_path: Path):
    made = load_plan(planned[0])
    altered = made.model_copy(update={"forward": made.forward.model_copy(update={"schedule_sha256": "0" * 64})})
    altered = altered.model_copy(update={"digest": altered.compute_digest()})
    altered.save(tmp_path / "altered.json")
    line = refusal(RUNNER.invoke(cli.app, ["check", str(tmp_path / "altered.json")]))
    assert line.startswith(f"sparsering: {tmp_path / 'altered.json'}: forward.schedule_sha256: ")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--memory-limit-bytes", "1000"), "memory_limit_bytes: 1000 is too little for any candidate"),
        (("--memory-limit-bytes", "0"), "memory_limit_bytes: must be positive, not 0"),
        (("--memory-fraction", "1.5"), "memory_fraction: must be above 0 and at most 1, not 1.5"),
        (("--dtype", "int8"), "--dtype: 'int8' is not one of bfloat16"),
        (("--backend", "abacus"), "--backend: 'abacus' is not one of"),
        (("--evaluator", "oracle"), "--evaluator: 'oracle' is not one of simulator, recurrence"),
        (("--layers", "0,x"), "--layers: '0,x' is not a list of whole numbers"),
        (("--layers", "17"), "layers: 17 was not recorded"),
        (("--steps", "5"), "steps: 5 was not recorded"),
        (("--layout", "spiral"), "layout: 'spiral' is not one of"),
        (("--placement", "random"), "placement: 'random' is not one of"),
        (("--narrow-gradients", "--layout", "ring"), "narrow_gradients: no layout that is left to choose from rounds"),
        (("--narrow-gradients", "--dtype", "float32"), "narrow_gradients: sums are kept in float32 as it is"),
        (("--pattern", "guess"), "pattern: 'guess' is not one of trace, choose"),
        (("--pattern", "choose"), "pattern: a synthetic trace was not chosen by a selector"),
    ],
)
def test_refusals_are_one_line(trace: Trace, tmp_path: Path, options: tuple[str, ...], named: str):
    path = tmp_path / "plan.json"
    assert named in refusal(plan(trace, "-o", str(path), *options))
    assert not path.exists()


def test_two_levels_within_a_node_where_asked_for(trace: Trace, tmp_path: Path):
    path = tmp_path / "plan.json"
    result = plan(trace, "-o", str(path), "--layout", "two_level", "--json")
    assert result.exit_code == 0, result.output
    made = load_plan(path)
    assert (made.forward.layout, made.backward.layout) == ("two_level", "two_level")


def test_unknown_clusters_and_traces_are_refused(trace: Trace, tmp_path: Path):
    assert "presets are" in refusal(plan(trace, cluster="no-such-preset"))
    missing = ["plan", "--trace", str(tmp_path), "--cluster", "local-cpu-4"]
    assert "is not a trace" in refusal(RUNNER.invoke(cli.app, missing))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "newer", "missing"])
def test_damaged_plans_end_a_real_process_with_code_2(
    damage: str, planned: tuple[Path, dict[str, Any]], tmp_path: Path
):
    path = tmp_path / "plan.json"
    text = planned[0].read_text()
    if damage == "truncated":
        path.write_text(text[: len(text) // 2])
    elif damage == "flipped":
        path.write_text(text.replace('"bfloat16"', '"float16"'))
    elif damage == "newer":
        path.write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    done = subprocess.run(
        [sys.executable, "-m", "sparsering.cli", "check", str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sparsering: {path}: ")
    assert done.stdout == ""


def recorded(folder: Path, choices: list[HeadChoice], *, audit_sha256: str | None = "ab" * 32) -> Trace:
    """A trace of one layer as a capture writes it: an audited model's, chosen by a selector."""
    header = TraceHeader(
        model=ModelShape(model_id="tiny", layers=1, heads=4, kv_heads=2, head_dim=64),
        recorded_layers=(0,), seq_len_tokens=4000, block_size=128, origin="real", seed=0,
        audit_sha256=audit_sha256,
    )  # fmt: skip
    with TraceWriter(folder, header) as writer:
        writer.append(0, {0: (synthesize("vertical-slash", SETTINGS), choices)})
    return Trace.open(folder)


def test_a_check_builds_and_hashes_each_direction_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_synthetic_trace(tmp_path / "trace", "vertical-slash", SETTINGS, layers=1, kv_heads=2)
    arguments = [
        "plan",
        "--trace",
        str(tmp_path / "trace"),
        "--cluster",
        "local-cpu-4",
        "-o",
        str(tmp_path / "plan.json"),
    ]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    counts = {"built": 0, "hashed": 0}
    build, plain = Layout.build, schedule_module.hashlib.sha256

    def building(*given: Any, **named: Any) -> Any:
        counts["built"] += 1
        return build(*given, **named)

    def hashing(*given: Any, **named: Any) -> Any:
        counts["hashed"] += 1
        return plain(*given, **named)

    built_schedule.cache_clear()
    monkeypatch.setattr(Layout, "build", building)
    monkeypatch.setattr(schedule_module, "hashlib", SimpleNamespace(sha256=hashing))
    assert CliRunner().invoke(cli.app, ["check", str(tmp_path / "plan.json")]).exit_code == 0
    assert counts == {"built": 2, "hashed": 2}


def test_a_trace_of_a_model_that_nobody_audited_is_one_line(tmp_path: Path):
    choice = HeadChoice(selector="vertical-slash", settings={}, kept_mass_probe=1.0, kept_mass_sampled=1.0)
    recorded(tmp_path / "trace", [choice] * 4, audit_sha256=None)
    trace, output = str(tmp_path / "trace"), str(tmp_path / "plan.json")
    result = CliRunner().invoke(cli.app, ["plan", "--trace", trace, "--cluster", "local-cpu-4", "-o", output])
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("trace: audit_sha256: is missing: nobody audited the model; capture it anew")
    assert not (tmp_path / "plan.json").exists()


def test_patterns_can_be_chosen_as_the_trace_chose_them(tmp_path: Path):
    choice = HeadChoice(selector="vertical-slash", settings={"columns": 70, "slashes": 100})
    made = plan_trace(
        recorded(tmp_path / "one", [choice] * 4), load_cluster("local-cpu-4"), SearchSpace(pattern="choose")
    )
    assert made.pattern.model_dump() == {
        "source": "choose",
        "selector": "vertical-slash",
        "settings": {"columns": 70, "slashes": 100},
        "trace_sha256": None,
        "listed": False,
    }
    other = HeadChoice(selector="vertical-slash", settings={"columns": 70, "slashes": 50})
    mixed = recorded(tmp_path / "two", [choice, choice, choice, other])
    with pytest.raises(UnsupportedError, match="2 different ways"):
        plan_trace(mixed, load_cluster("local-cpu-4"), SearchSpace(pattern="choose"))


def test_an_empty_trace_is_refused(tmp_path: Path):
    header = recorded(tmp_path / "some", [HeadChoice(selector="vertical-slash")] * 4).header
    TraceWriter(tmp_path / "none", header).close()
    with pytest.raises(InputError, match="holds no training step"):
        plan_trace(Trace.open(tmp_path / "none"), load_cluster("local-cpu-4"))


def test_reports_progress_of_every_stage(trace: Trace):
    seen: dict[str, tuple[int, int]] = {}
    plan_trace(
        trace,
        load_cluster("local-cpu-4"),
        SearchSpace(layers=(0,)),
        evaluator=simulate,
        progress=lambda stage, done, total: seen.update({stage: (done, total)}),
    )
    assert list(seen) == ["reading the trace", "estimating", "simulating plain layouts", "choosing"]
    assert all(done == total > 0 for done, total in seen.values())
