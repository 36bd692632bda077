"""The whole road on one small machine: train, capture, plan, simulate, run, verify, report.

Everything goes through the same doors that users have: the trace writer, the planner, `sparsering run` on processes of
its own. What simulator and report do is handed in, since the runtime does not import the simulator.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.select.vertical_slash import FlexVerticalSlash
from ...planner.cost.cluster import Cluster, load_cluster
from ...planner.layouts.ring import Ring
from ...planner.plan import AttentionSpec, KernelSpec, ModelShape, Plan, load_plan, make_plan
from ...planner.schedule.placement import zigzag
from ...planner.search.problem import SearchSpace
from ...planner.search.sampling import pattern_spec, summarize
from ...planner.search.search import plan_trace
from ...traces.dataset.manifest import library_versions
from ...traces.dataset.store import Trace
from ...traces.dataset.writer import TraceWriter
from ...traces.files import write_json
from ...traces.pattern import LayerPattern
from ...traces.stats import describe
from ...traces.timeline import Timeline
from ..comm.mesh import inherited_environment
from ..comm.start import start_ranks
from ..hf.capture import CaptureSettings, capture_model, trace_header
from .calibrate import Calibration, FittedCost, calibrate
from .folder import KIND, MEASURED, METRICS, PLAN_CLUSTER, PLAN_LOCAL, REPORT, SIMULATED, TRACE
from .model import MODEL_ID, make_model, standard_library_bytes, train
from .stages import Stage, Stages

CLUSTER_PRESET = "a100-hdr-4x8"
LOCAL_PRESET = "local-cpu-4"
SELECTOR = FlexVerticalSlash(column_mass=0.7, column_cap=128, slash_mass=0.7, slash_cap=64)
TRAINING_TEXT_BYTES = 2_000_000
STAGES = 8
BLOCK_SIZE = 64
REPEATS = 3  # measured runs of the local plan, of which the median is kept
METRICS_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demo: its folder, its sizes, and what other houses do for it.

    train_seconds: train for no longer; command: what stands in the files as their origin. services: evaluator, a
    `planner.evaluation.Evaluator`; simulate_plan, (plan, pattern, cluster, cost=) -> an object with `timeline`;
    timeline_metrics, timeline -> list of objects with `to_json()`; write_report, (folder) writes the page from all that
    the folder holds.
    """

    folder: Path
    seq_len_tokens: int
    train_seconds: float
    seed: int
    command: str
    services: Mapping[str, Any]
    stages: Stages = field(default_factory=lambda: Stages(total=STAGES))


def run_demo(demo: Demo) -> dict[str, Any]:
    """Fill the demo's folder with its files and return the content of its metrics.json.

    `verified` in it says whether the run agrees with the reference. Raises InputError for sizes that cannot be.
    """
    folder, services = demo.folder, demo.services
    trained, window, model = _train(demo)
    trace = _capture(demo, model, window)
    layer = trace.layers[len(trace.layers) // 2]
    pattern = trace.layer_pattern(trace.steps[-1], layer)
    fitted = _calibrate(demo, trace, layer, pattern)
    local_space = SearchSpace(dtype="float64", kernels=KernelSpec(backend="blockwise"))
    with demo.stages.stage("Plan for 4 local workers") as stage:
        local = _plan(demo, stage, PLAN_LOCAL, trace, fitted.cluster, local_space, cost=fitted.cost)
    with demo.stages.stage("Plan for 32 A100s, simulating the best candidates") as stage:
        # For one layer: simulating 32 ranks takes seconds for every layer more.
        space = SearchSpace(layers=(layer,))
        cluster = _plan(demo, stage, PLAN_CLUSTER, trace, load_cluster(CLUSTER_PRESET), space)
    with demo.stages.stage("Simulate the local plan") as stage:
        simulated = services["simulate_plan"](local, pattern, fitted.cluster, cost=fitted.cost).timeline
        simulated.save(folder / SIMULATED)
        stage.said = f"{simulated.makespan_us / 1e3:,.0f} ms for one layer, forward and backward"
    with demo.stages.stage("Run it on 4 processes, check every number against the reference") as stage:
        summary = _run(demo, folder / PLAN_LOCAL, layer, folder / MEASURED, ["--repeats", str(REPEATS), "--verify"])
        measured = Timeline.load(folder / MEASURED)
        verified = bool(summary["verified"]) and all(one["ok"] for one in summary["verified"])
        worst = max((one["error"] for one in summary["verified"]), default=float("nan"))
        verdict = f"largest error {worst:.0e}" if verified else "WRONG: see metrics.json"
        stage.said = f"{summary['step_time_us'] / 1e3:,.0f} ms; {verdict}"
    metrics = {
        "kind": KIND,
        "schema_version": METRICS_SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": demo.command,
        "seed": demo.seed,
        "versions": {"python": platform.python_version()}
        | library_versions("sparsering", "torch", "transformers", "numpy"),
        "hardware": {"machine": platform.machine(), "system": sys.platform, "cores": os.cpu_count(),
                     "torch_threads": torch.get_num_threads()},
        "training": trained,
        "trace": describe(trace),
        "layer": layer,
        "plans": {PLAN_CLUSTER: _plan_record(cluster), PLAN_LOCAL: _plan_record(local)},
        "calibration": fitted.record(),
        "step_time_us": {"simulated": simulated.makespan_us, "measured": summary["step_time_us"]},
        "measured_step_times_us": summary["step_times_us"],
        "simulated": [one.to_json() for one in services["timeline_metrics"](simulated)],
        "measured": [one.to_json() for one in services["timeline_metrics"](measured)],
        "verification": summary["verified"],
        "verified": verified,
    }  # fmt: skip
    write_json(folder / METRICS, metrics)
    with demo.stages.stage("Write the report") as stage:
        services["write_report"](folder)
        stage.said = f"{(folder / REPORT).stat().st_size / 1e6:.1f} MB"
    return metrics | {"seconds": dict(demo.stages.seconds)}


def _train(demo: Demo) -> tuple[dict[str, Any], Tensor, Any]:
    """Return what training did, tokens that it did not see, and the model."""
    with demo.stages.stage("Train a small model on Python's standard library") as stage:
        stage("reading the sources", 0, 1)
        needed = TRAINING_TEXT_BYTES + demo.seq_len_tokens
        text = bytearray(standard_library_bytes(at_least_bytes=needed)[:needed])
        tokens = torch.frombuffer(text, dtype=torch.uint8).long()
        model = make_model(seed=demo.seed, seq_len_tokens=demo.seq_len_tokens)
        trained = train(model, tokens[:TRAINING_TEXT_BYTES], seconds=demo.train_seconds, seed=demo.seed, progress=stage)
        stage.said = (
            f"{trained['parameters'] / 1e6:.1f} M parameters, {trained['steps']} steps, "
            f"loss {trained['first_loss']:.2f} → {trained['last_loss']:.2f} per byte"
        )
    return trained, tokens[TRAINING_TEXT_BYTES:], model


def _capture(demo: Demo, model: Any, window: Tensor) -> Trace:
    """Capture one window that the model was not trained on."""
    with demo.stages.stage(f"Capture what it attends to over {demo.seq_len_tokens:,} tokens") as stage:
        header = trace_header(
            model, model_id=MODEL_ID, seq_len_tokens=demo.seq_len_tokens, block_size=BLOCK_SIZE, seed=demo.seed
        )
        capture = CaptureSettings(selector=SELECTOR, seed=demo.seed)
        with TraceWriter(demo.folder / TRACE, header) as writer:
            capture_model(model, window, writer, capture, progress=stage)
        trace = Trace.open(demo.folder / TRACE)
        size = sum(part.bytes for part in trace.manifest.parts)
        rows = describe(trace)["layers"]
        density = sum(row["density_mean"] for row in rows) / len(rows)
        kept = sum(row["kept_mass_sampled_mean"] for row in rows) / len(rows)
        stage.said = f"density {density:.2f}, {kept:.0%} of attention kept, {size / 1e3:.0f} kB"
    return trace


def _calibrate(demo: Demo, trace: Trace, layer: int, pattern: LayerPattern) -> Calibration:
    """Time a plain zigzag ring on this machine and fit costs to it."""
    with (
        demo.stages.stage("Time this machine on a plain ring (4 processes)") as stage,
        tempfile.TemporaryDirectory() as made,
    ):
        path, timeline = Path(made) / "plan.json", Path(made) / "timeline.json.gz"
        preset, header = load_cluster(LOCAL_PRESET), trace.header
        plan = make_plan(
            attention=AttentionSpec(
                model=ModelShape(**header.model.model_dump(exclude={"model_id"})), seq_len_tokens=header.seq_len_tokens,
                block_size=header.block_size, dtype="float64", columns_capacity=summarize(trace).columns_capacity,
            ),
            placement=zigzag(
                seq_len_tokens=header.seq_len_tokens, world_size=preset.world_size, granularity_tokens=header.block_size
            ),
            forward=Ring(prefetch=1), pattern=pattern_spec(trace, "trace", ()),
            kernels=KernelSpec(backend="blockwise"),
        )  # fmt: skip
        plan.save(path)
        summary = _run(demo, path, layer, timeline, ["--repeats", "1"])
        stage.said = f"{summary['step_time_us'] / 1e3:,.0f} ms for one layer"
        return calibrate(preset, plan, pattern, Timeline.load(timeline))


def _plan(
    demo: Demo, stage: Stage, name: str, trace: Trace, cluster: Cluster, space: SearchSpace, *,
    cost: FittedCost | None = None,
) -> Plan:  # fmt: skip
    """Plan the trace for a cluster, write the plan and return it as it was written."""
    plan = plan_trace(
        trace, cluster, space, cost=cost, evaluator=demo.services["evaluator"], progress=stage,
        provenance={"command": demo.command, "seed": demo.seed},
    )  # fmt: skip
    plan.save(demo.folder / name)
    stage.said = plan.predictions["verdict"]
    return load_plan(demo.folder / name)


def _run(demo: Demo, plan: Path, layer: int, output: Path, options: Sequence[str]) -> dict[str, Any]:
    """Do `sparsering run` on processes of its own and return the figures that it prints.

    A run that fails to verify returns its figures too; any other failure raises RuntimeError with what was said.
    """
    arguments = ["run", str(plan), "--trace", str(demo.folder / TRACE), "--layer", str(layer), "--output", str(output)]
    arguments += ["--seed", str(demo.seed), "--device", "cpu", "--json", *options]
    environment = inherited_environment(world_size=4)
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complaints:
        code = start_ranks(arguments, world_size=4, environment=environment, stdout=printed, stderr=complaints)
        printed.seek(0)
        complaints.seek(0)
        try:
            summary = json.loads(printed.read())
        except ValueError:
            said = complaints.read().decode(errors="replace").strip()
            raise RuntimeError(f"sparsering run ended with exit code {code}:\n{said}") from None
    if code and all(one["ok"] for one in summary["verified"]):
        raise RuntimeError(f"sparsering run ended with exit code {code}, though nothing failed to verify")
    return summary


def _plan_record(plan: Plan) -> dict[str, Any]:
    told = {key: value for key, value in plan.predictions.items() if key != "candidates"}
    return {
        "digest": plan.digest,
        "placement": plan.placement.model_dump(exclude={"units"}),
        "forward": plan.forward.model_dump(),
        "backward": plan.backward.model_dump(),
        "predictions": told,
    }
