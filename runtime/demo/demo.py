"""The whole road on one small machine: train, capture, plan, simulate, run, verify, report.

Everything goes through the same doors that users have: the trace writer, the planner, `sparsering run` on processes of
its own. What simulator and report do is handed in (`Services`), since the runtime does not import the simulator.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...planner.cost.cluster import Cluster, load_cluster
from ...planner.plan import KernelSpec, ModelShape, Plan, load_plan, make_plan
from ...planner.search.candidates import PlacementChoice
from ...planner.search.sampling import pattern_spec, summarize
from ...planner.search.search import plan_trace
from ...traces.dataset.manifest import library_versions
from ...traces.dataset.store import Trace, TraceWriter
from ...traces.files import write_json
from ...traces.pattern import LayerPattern
from ...traces.stats import describe
from ...traces.timeline import Timeline
from ..attention.selectors import make_selector
from ..comm.launch import launch_ranks
from ..comm.mesh import inherited_environment
from ..hf.capture import CaptureSettings, capture_model, trace_header
from .calibrate import Calibration, calibrate
from .folder import KIND, MEASURED, METRICS, PLAN_CLUSTER, PLAN_LOCAL, REPORT, SIMULATED, TRACE
from .model import MODEL_ID, Trained, TrainingSettings, make_model, train
from .sample_text import byte_tokens, standard_library_bytes
from .stages import Stages

CLUSTER_PRESET = "a100-hdr-4x8"
LOCAL_PRESET = "local-cpu-4"
SELECTOR = "flex"
SELECTOR_SETTINGS = {"column_mass": 0.7, "column_cap": 128, "slash_mass": 0.7, "slash_cap": 64}
TRAINING_TEXT_BYTES = 2_000_000
STAGES = 8
METRICS_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo. repeats: measured runs of the local plan, of which the median is kept."""

    seq_len_tokens: int = 8192
    block_size: int = 64
    training: TrainingSettings = field(default_factory=TrainingSettings)
    repeats: int = 3
    seed: int = 0
    command: str = "sparsering demo"


@dataclass(frozen=True, kw_only=True)
class Services:
    """What other houses do for the demo.

    evaluator: a `planner.evaluation.Evaluator`; simulate_plan: (plan, pattern, cluster, cost=) -> an object with
    `timeline` and `makespan_us`; timeline_metrics: timeline -> list of objects with `to_json()`;
    write_report: (folder) writes the page from all that the folder holds.
    """

    evaluator: Any
    simulate_plan: Callable[..., Any]
    timeline_metrics: Callable[[Timeline], list[Any]]
    write_report: Callable[[Path], None]


def run_demo(folder: Path, settings: DemoSettings, services: Services) -> dict[str, Any]:
    """Fill `folder` with the demo's files and return the content of its metrics.json.

    `verified` in it says whether the run agrees with the reference. Raises InputError for sizes that cannot be.
    """
    stages = Stages(total=STAGES)
    trained, window, model = _train(settings, stages)
    trace = _capture(folder, settings, model, window, stages)
    pattern, layer = _middle_layer(trace)
    calibration = _calibrate(trace, pattern, settings, stages)
    local = _plan_local(folder, trace, calibration, settings, services, stages)
    cluster = _plan_cluster(folder, trace, layer, settings, services, stages)
    with stages.stage("Simulate the local plan") as stage:
        simulated = services.simulate_plan(local, pattern, calibration.cluster, cost=calibration.cost).timeline
        simulated.save(folder / SIMULATED)
        stage.said = f"{simulated.makespan_us / 1e3:,.0f} ms for one layer, forward and backward"
    with stages.stage("Run it on 4 processes, check every number against the reference") as stage:
        summary = _run(
            folder / PLAN_LOCAL,
            folder / TRACE,
            layer,
            output=folder / MEASURED,
            repeats=settings.repeats,
            seed=settings.seed,
            verify=True,
        )
        measured = Timeline.load(folder / MEASURED)
        verified = bool(summary["verified"]) and all(one["ok"] for one in summary["verified"])
        stage.said = _said_of_run(summary, verified)
    metrics = {
        "kind": KIND,
        "schema_version": METRICS_SCHEMA_VERSION,
        **_provenance(settings),
        "training": asdict(trained),
        "trace": describe(trace),
        "layer": layer,
        "plans": {PLAN_CLUSTER: _plan_record(cluster), PLAN_LOCAL: _plan_record(local)},
        "calibration": calibration.record(),
        "step_time_us": {"simulated": simulated.makespan_us, "measured": summary["step_time_us"]},
        "measured_step_times_us": summary["step_times_us"],
        "simulated": [one.to_json() for one in services.timeline_metrics(simulated)],
        "measured": [one.to_json() for one in services.timeline_metrics(measured)],
        "verification": summary["verified"],
        "verified": verified,
    }
    write_json(folder / METRICS, metrics)
    with stages.stage("Write the report") as stage:
        services.write_report(folder)
        stage.said = f"{(folder / REPORT).stat().st_size / 1e6:.1f} MB"
    return metrics | {"seconds": dict(stages.seconds)}


def _train(settings: DemoSettings, stages: Stages) -> tuple[Trained, Tensor, Any]:
    with stages.stage("Train a small model on Python's standard library") as stage:
        stage("reading the sources", 0, 1)
        needed = TRAINING_TEXT_BYTES + settings.seq_len_tokens
        tokens = byte_tokens(standard_library_bytes(at_least_bytes=needed))[:needed]
        model = make_model(seed=settings.seed, seq_len_tokens=settings.seq_len_tokens)
        trained = train(model, tokens[:TRAINING_TEXT_BYTES], settings.training, progress=stage)
        stage.said = (
            f"{trained.parameters / 1e6:.1f} M parameters, {trained.steps} steps, "
            f"loss {trained.first_loss:.2f} → {trained.last_loss:.2f} per byte"
        )
    return trained, tokens[TRAINING_TEXT_BYTES:], model


def _capture(folder: Path, settings: DemoSettings, model: Any, window: Tensor, stages: Stages) -> Trace:
    """Capture one window that the model was not trained on."""
    with stages.stage(f"Capture what it attends to over {settings.seq_len_tokens:,} tokens") as stage:
        header = trace_header(
            model,
            model_id=MODEL_ID,
            seq_len_tokens=settings.seq_len_tokens,
            block_size=settings.block_size,
            seed=settings.seed,
        )
        capture = CaptureSettings(selector=make_selector(SELECTOR, SELECTOR_SETTINGS), seed=settings.seed)
        with TraceWriter(folder / TRACE, header) as writer:
            capture_model(model, window, writer, capture, progress=stage)
        trace = Trace.open(folder / TRACE)
        size = sum(part.bytes for part in trace.manifest.parts)
        rows = describe(trace)["layers"]
        density = sum(row["density_mean"] for row in rows) / len(rows)
        kept = sum(row["kept_mass_sampled_mean"] for row in rows) / len(rows)
        stage.said = f"density {density:.2f}, {kept:.0%} of attention kept, {size / 1e3:.0f} kB"
    return trace


def _middle_layer(trace: Trace) -> tuple[LayerPattern, int]:
    layer = trace.layers[len(trace.layers) // 2]
    return trace.layer_pattern(trace.steps[-1], layer), layer


def _calibrate(trace: Trace, pattern: LayerPattern, settings: DemoSettings, stages: Stages) -> Calibration:
    """Time a plain zigzag ring on this machine and fit costs to it."""
    with (
        stages.stage("Time this machine on a plain ring (4 processes)") as stage,
        tempfile.TemporaryDirectory() as made,
    ):
        preset = load_cluster(LOCAL_PRESET)
        plan = _plain_ring(trace, preset)
        path = Path(made) / "plan.json"
        plan.save(path)
        timeline = Path(made) / "timeline.json.gz"
        layer = _middle_layer(trace)[1]
        summary = _run(path, trace.folder, layer, output=timeline, repeats=1, seed=settings.seed)
        stage.said = f"{summary['step_time_us'] / 1e3:,.0f} ms for one layer"
        return calibrate(preset, plan, pattern, Timeline.load(timeline))


def _plain_ring(trace: Trace, cluster: Cluster) -> Plan:
    header = trace.header
    summary = summarize(trace)
    placement = PlacementChoice(name="zigzag", granularity_tokens=header.block_size).build(
        seq_len_tokens=header.seq_len_tokens,
        world_size=cluster.world_size,
        block_size=header.block_size,
        block_load=summary.block_load,
    )
    return make_plan(
        model=ModelShape(**header.model.model_dump(exclude={"model_id"})),
        seq_len_tokens=header.seq_len_tokens,
        block_size=header.block_size,
        dtype="float64",
        columns_capacity=summary.columns_capacity,
        placement=placement,
        forward=("ring", {"prefetch": 1}),
        backward=("ring", {"prefetch": 1}),
        pattern=pattern_spec(trace, "trace", ()),
        kernels=KernelSpec(backend="blockwise"),
    )


def _plan_local(
    folder: Path, trace: Trace, calibration: Calibration, settings: DemoSettings, services: Services, stages: Stages
) -> Plan:
    with stages.stage("Plan for 4 local workers") as stage:
        plan = plan_trace(
            trace,
            calibration.cluster,
            cost=calibration.cost,
            evaluator=services.evaluator,
            dtype="float64",
            backend="blockwise",
            seed=settings.seed,
            command=settings.command,
            progress=stage,
        )
        plan.save(folder / PLAN_LOCAL)
        stage.said = plan.predictions["verdict"]
    return load_plan(folder / PLAN_LOCAL)


def _plan_cluster(
    folder: Path, trace: Trace, layer: int, settings: DemoSettings, services: Services, stages: Stages
) -> Plan:
    """Plan for one layer: simulating 32 ranks takes seconds for every layer more."""
    with stages.stage("Plan for 32 A100s, simulating the best candidates") as stage:
        plan = plan_trace(
            trace,
            load_cluster(CLUSTER_PRESET),
            evaluator=services.evaluator,
            layers=[layer],
            seed=settings.seed,
            command=settings.command,
            progress=stage,
        )
        plan.save(folder / PLAN_CLUSTER)
        stage.said = plan.predictions["verdict"]
    return load_plan(folder / PLAN_CLUSTER)


def _run(
    plan: Path, trace: Path, layer: int, *, output: Path, repeats: int, seed: int, verify: bool = False
) -> dict[str, Any]:
    """Do `sparsering run` on processes of its own and return the figures that it prints.

    A run that fails to verify returns its figures too; any other failure raises RuntimeError with what was said.
    """
    arguments = ["run", str(plan), "--trace", str(trace), "--layer", str(layer), "--output", str(output)]
    arguments += ["--repeats", str(repeats), "--seed", str(seed), "--device", "cpu", "--json"]
    environment = inherited_environment(world_size=4)
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complaints:
        code = launch_ranks(
            arguments + ["--verify"] * verify, world_size=4, environment=environment, stdout=printed, stderr=complaints
        )
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


def _said_of_run(summary: Mapping[str, Any], verified: bool) -> str:
    worst = max((one["error"] for one in summary["verified"]), default=float("nan"))
    verdict = f"largest error {worst:.0e}" if verified else "WRONG: see metrics.json"
    return f"{summary['step_time_us'] / 1e3:,.0f} ms; {verdict}"


def _plan_record(plan: Plan) -> dict[str, Any]:
    told = {key: value for key, value in plan.predictions.items() if key != "candidates"}
    return {
        "digest": plan.digest,
        "placement": plan.placement.model_dump(exclude={"units"}),
        "forward": plan.forward.model_dump(),
        "backward": plan.backward.model_dump(),
        "predictions": told,
    }


def _provenance(settings: DemoSettings) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": settings.command,
        "seed": settings.seed,
        "versions": {"python": platform.python_version()}
        | library_versions("sparsering", "torch", "transformers", "numpy"),
        "hardware": {"machine": platform.machine(), "system": sys.platform, "cores": os.cpu_count(),
                     "torch_threads": torch.get_num_threads()},
    }  # fmt: skip
