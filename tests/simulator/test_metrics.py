"""Metrics of timelines against the evaluations they came from, and the verbs that print them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from sparsering.cli import app
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.simulator.engine import Jitter, simulate_layer
from sparsering.simulator.metrics import timeline_metrics
from sparsering.simulator.simulate_plan import simulate_plan
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from sparsering.traces.timeline import Span, Timeline

NOISE = Jitter(sigma=0.1, seed=3)


@pytest.mark.parametrize("layout", ["ring", "gather", "hierarchical"])
def test_a_timeline_says_what_its_evaluation_says(layout: str) -> None:
    parameters = {"inner_size": 2} if layout == "hierarchical" else {}
    forward = tiny.schedule(layout, 4, "forward", columns=3, **parameters)
    backward = tiny.schedule(layout, 4, "backward", columns=3, **parameters)
    cluster = tiny.cluster(nodes=2, gpus=2, slowdown=0.2)
    layer = simulate_layer((forward, backward), tiny.dense_workload(4), cluster, tiny.PairCost(), timeline=True)
    assert layer.timeline is not None
    for found, said in zip(timeline_metrics(layer.timeline), (layer.forward, layer.backward), strict=True):
        assert found.makespan_us == pytest.approx(said.makespan_us)
        assert found.compute_mean_us == pytest.approx(said.compute_us.mean())
        assert found.exposed_mean_us == pytest.approx(said.exposed_us.mean())
        assert found.worker_imbalance == pytest.approx(said.worker_imbalance)
        assert found.step_imbalance == pytest.approx(said.step_imbalance)
        exposed = sum(phase.exposed_mean_us for phase in found.phases) + found.tail_mean_us
        assert exposed == pytest.approx(found.exposed_mean_us)
        means = [phase.compute_mean_us for phase in found.phases]
        assert means == pytest.approx(said.phase_us.mean(axis=0)[: len(means)])
        assert not said.phase_us[:, len(means) :].any()


def span(rank: int, stream: str, phase: int, start_us: float, duration_us: float) -> Span:
    return Span(
        rank=rank,
        stream=stream,
        name="x",
        category="compute" if stream == "compute" else "kv",
        direction="forward",
        phase=phase,
        start_us=start_us,
        duration_us=duration_us,
    )


def test_a_measured_timeline_by_hand() -> None:
    spans = (
        span(0, "compute", 0, 10.0, 4.0),
        span(1, "compute", 0, 11.0, 2.0),
        span(0, "ring", 0, 10.0, 6.0),
        span(0, "compute", 1, 16.0, 2.0),
        span(1, "compute", 1, 16.0, 4.0),
    )
    (found,) = timeline_metrics(Timeline(source="measured", world_size=2, spans=spans))
    assert (found.makespan_us, found.compute_mean_us, found.exposed_mean_us, found.tail_mean_us) == (10, 6, 4, 1)
    first, second = found.phases
    assert (first.compute_mean_us, first.compute_max_us, first.exposed_mean_us, first.transfer_us) == (3, 4, 0.5, 6)
    assert (second.compute_mean_us, second.compute_max_us, second.exposed_mean_us, second.transfer_us) == (3, 4, 2.5, 0)
    assert (found.worker_imbalance, found.step_imbalance) == (1.0, 8 / 6)


def test_an_empty_timeline_is_refused() -> None:
    with pytest.raises(InputError, match="holds no spans"):
        timeline_metrics(Timeline(source="measured", world_size=2, spans=()))


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    settings = SyntheticSettings(seq_len_tokens=4096, heads=4, block_size=128, density=0.2, columns=64)
    return write_synthetic_trace(tmp_path / "trace", "vertical-slash", settings, layers=3, kv_heads=2, head_dim=64)


def planned(trace: Trace, seq_len_tokens: int = 4096) -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=3, heads=4, kv_heads=2, head_dim=64),
            seq_len_tokens=seq_len_tokens,
            block_size=128,
            dtype="float32",
            columns_capacity=64,
        ),
        placement=striped(seq_len_tokens=seq_len_tokens, world_size=4, granularity_tokens=128),
        forward=Ring(prefetch=1),
        backward=Hierarchical(inner_size=2),
        pattern=PatternSpec(source="trace", trace_sha256=trace.digest()),
        kernels=KernelSpec(backend="blockwise"),
    ).with_record(provenance={"trace": trace.folder.name})


def test_simulate_writes_a_timeline_that_compare_reads(trace: Trace, tmp_path: Path) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "timeline.json.gz"
    planned(trace).save(plan)
    arguments = ["simulate", str(plan), "--cluster", "local-cpu-4", "-o", str(output), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["layer"], said["training_step"], said["cluster"]) == (1, 0, "local-cpu-4")
    assert said["validity"].startswith("unvalidated")
    timeline = Timeline.load(output)
    assert timeline.metadata["plan_digest"] == said["plan_digest"]
    assert said["step_time_us"] == pytest.approx(timeline.makespan_us)
    assert sum(one["makespan_us"] for one in said["directions"]) == pytest.approx(timeline.makespan_us)

    compared = CliRunner().invoke(app, ["compare", str(output), str(output), "--json"])
    assert compared.exit_code == 0, compared.stderr
    sides = json.loads(compared.stdout)
    assert sides["a"] == sides["b"]
    assert sides["a"]["directions"] == said["directions"]
    table = CliRunner().invoke(app, ["compare", str(output), str(output)])
    assert table.exit_code == 0
    assert "A is timeline.json.gz (simulated)" in table.stdout and "\nforward\n" in table.stdout


def test_simulate_prints_a_table(trace: Trace, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    planned(trace).save(plan)
    result = CliRunner().invoke(app, ["simulate", str(plan), "--cluster", "local-cpu-4", "--layer", "0"])
    assert result.exit_code == 0, result.stderr
    for word in ("forward", "backward", "worker", "One layer takes", "unvalidated"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "local-cpu-4", "--layer", "9"], "layer: 9 was not recorded"),
        (["--cluster", "local-cpu-4", "--step", "9"], "training_step: 9 was not recorded"),
        (["--cluster", "nowhere"], "nowhere: no such file or preset"),
        (["--cluster", "local-cpu-4", "--jitter", "-1"], "jitter"),
    ],
)
def test_simulate_refuses_in_one_line(trace: Trace, tmp_path: Path, arguments: list[str], message: str) -> None:
    plan = tmp_path / "plan.json"
    planned(trace).save(plan)
    result = CliRunner().invoke(app, ["simulate", str(plan), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_trace_than_the_plan_s_is_refused(trace: Trace, tmp_path: Path) -> None:
    settings = SyntheticSettings(seq_len_tokens=4096, heads=4, block_size=128)
    other = write_synthetic_trace(tmp_path / "other", "vertical-slash", settings, seed=1, kv_heads=2, head_dim=64)
    plan = tmp_path / "plan.json"
    planned(trace).save(plan)
    result = CliRunner().invoke(app, ["simulate", str(plan), "--cluster", "local-cpu-4", "--trace", str(other.folder)])
    assert result.exit_code == 2
    assert f"the trace {other.folder} has {other.digest()}" in result.stderr


def test_patterns_that_do_not_fit_the_plan_are_refused(trace: Trace) -> None:
    cluster = load_cluster("local-cpu-4")
    with pytest.raises(InputError, match="seq_len_tokens: the plan is for 8192, not for 4096"):
        simulate_plan(planned(trace, seq_len_tokens=8192), trace.layer_pattern(0, 0), cluster)
    with pytest.raises(InputError, match="has 1 heads in blocks of 128, the plan 4 in blocks of 128"):
        few = tiny.dense(seq_len_tokens=4096, block_size=128, heads=1)
        simulate_plan(planned(trace), few, cluster)


def test_a_plan_plays_the_same_twice(trace: Trace) -> None:
    cluster = load_cluster("local-cpu-4")
    runs = [simulate_plan(planned(trace), trace.layer_pattern(0, 1), cluster, jitter=NOISE) for _ in range(2)]
    assert runs[0].timeline == runs[1].timeline
    assert np.array_equal(runs[0].backward.phase_us, runs[1].backward.phase_us)
