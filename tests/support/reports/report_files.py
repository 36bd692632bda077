"""Small files of every kind that a report is made of, written by the verbs and classes that write them for users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sparsering.cli import app
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.plan import load_plan
from sparsering.planner.replay import recorded_layer
from sparsering.simulator.engine import Jitter
from sparsering.simulator.simulate_plan import simulate_plan
from sparsering.traces.dataset.store import Trace
from sparsering.traces.files import write_json
from sparsering.traces.yaml_files import yaml_text

RUNNER = CliRunner()
# As rank 0 of a real run wrote it, its lists of heads left out.
METRICS_LINE: dict[str, Any] = {
    "rank": 0, "step": 1, "loss": 5.486993963068182, "grad_norm": 3.333138095962676, "learning_rate": 0.001,
    "valid_tokens": 1023, "step_time_us": 1095458.7400010496, "tokens_per_s": 934.7682049613469,
    "attention_forward_ms": 376.595646, "attention_backward_ms": 294.68539499999997, "choosing_ms": 2.032872,
    "mfu_actual": 0.015991266635914755, "mfu_dense_equivalent": 0.029266470775493818, "density": 0.33088235294117646,
    "density_per_layer": [0.33088235294117646, 0.33088235294117646], "density_per_head": [],
    "imbalance_per_layer": [1.0666666666666667, 1.0666666666666667], "kept_mass": 0.41418062150478363,
    "kept_mass_per_layer": [0.41434478387236595, 0.4140164591372013], "memory_bytes": None,
    "exposed_communication_ms": 240.770175,
}  # fmt: skip
DENSE = {"density": 1.0, "density_per_layer": [], "imbalance_per_layer": [], "kept_mass": 1.0}


def invoke(*arguments: object) -> Any:
    """Call a verb and return its result."""
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def called(*arguments: object) -> str:
    """Call a verb that must succeed and return what it prints."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_trace(folder: Path, kind: str = "xattention", *, columns: int = 0, tokens: int = 4096) -> Path:
    """Write a trace of one layer in blocks of 64."""
    sizes = ("--seq-len", tokens, "--block-size", 64, "--heads", 4, "--kv-heads", 2, "--head-dim", 64)
    called("synthesize", kind, "-o", folder, *sizes, "--layers", 1, "--density", 0.1, "--columns", columns)
    return folder


def write_cluster(path: Path, *, preset: str = "a100-hdr-4x8", nodes: int = 2, gpus: int = 2, **changes: Any) -> Path:
    """Write a small cluster, by default of A100s over two nodes, where planning helps."""
    wanted = {"name": f"{nodes}-by-{gpus}", "nodes": nodes, "gpus_per_node": gpus}
    cluster = load_cluster(preset).model_copy(update=wanted | changes)
    path.write_text(yaml_text(cluster.model_dump(mode="json", exclude_none=True)))
    return path


def write_plan(path: Path, trace: Path, cluster: Path, *options: object) -> Path:
    """Plan a trace for a cluster by the quick recurrence."""
    called("plan", "--trace", trace, "--cluster", cluster, "--evaluator", "recurrence", "-o", path, *options)
    return path


def write_timelines(folder: Path, plan: Path, trace: Path, cluster: Path, *, slower: float = 1.1) -> None:
    """Write a simulated timeline of a plan, and in place of a measured one an uneven one, so many times as long."""
    made, recorded = load_plan(plan), recorded_layer(Trace.open(trace), None, None)
    where = load_cluster(cluster)
    called("simulate", plan, "--trace", trace, "--cluster", cluster, "-o", folder / "simulated.json.gz")
    noisy = simulate_plan(made, recorded.pattern, where, jitter=Jitter(sigma=0.1, seed=1)).timeline
    assert noisy is not None
    spans = (
        replace(span, start_us=span.start_us * slower, duration_us=span.duration_us * slower) for span in noisy.spans
    )
    metadata = {"plan_digest": made.digest}
    replace(noisy, source="measured", spans=tuple(spans), flows=(), metadata=metadata).save(folder / "measured.json.gz")


def write_metrics(folder: Path, *, ranks: int = 4, steps: Sequence[int] = range(12), **changes: Any) -> Path:
    """Write metrics as the trainer does: one file a rank, one line a step."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        lines = []
        for step in steps:
            line = METRICS_LINE | {"rank": rank, "step": step, "loss": 5.5 - 0.1 * step} | changes
            lines.append(json.dumps(line) + "\n")
        (folder / f"rank-{rank:05d}.jsonl").write_text("".join(lines))
    return folder


def evaluation(**changes: Any) -> dict[str, Any]:
    """A file of `sparsering eval`, as far as a page shows it: two layers, buckets, lengths and depths."""
    buckets = [(0, 1024, 4096), (1024, 2048, 4096)]
    readings = [
        {"quantity": quantity, "arm": arm, "tokens": 8192, "mean": mean, "error": 0.01, "buckets": [
            {"first": first, "until": until, "tokens": tokens, "mean": mean + first / 1e5, "error": 0.02}
            for first, until, tokens in buckets]}
        for quantity, arm, mean in (("loss", "dense", 2.5), ("cut_loss", "dense", 2.6), ("loss", "sparse", 2.75),
                                    ("cut_loss", "sparse", 2.8), ("cut_minus_whole", "sparse", 0.05),
                                    ("loss_minus_dense", "sparse", 0.25), ("kl", "sparse", 0.125))
    ]  # fmt: skip
    asked: list[tuple[Any, ...]] = [("needle", arm, 1, length, place, depth, 50, 37, 0.74, 0.604, 0.842)
             for arm in ("dense", "sparse") for place in ("last", "mid") for length in (1024, 2048)
             for depth in (0.0, 0.5)]  # fmt: skip
    names = (
        "task",
        "arm",
        "planted",
        "length_tokens",
        "question",
        "depth_from",
        "asked",
        "found",
        "share",
        "low",
        "high",
    )
    asked.append(("tracking", "sparse", 4, 2048, "mid", None, 52, 13, 0.25, 0.15, 0.38))
    cells: list[dict[str, Any]] = [dict(zip(names, one, strict=True)) for one in asked]
    cells = [one | {"depth_until": None if one["depth_from"] is None else one["depth_from"] + 0.5} for one in cells]
    unattended = {"1024": [0.1 * head for head in range(4)], "8192": None}
    reach = [{"layer": layer, "total_density": [0.25] * 4, "unattended": unattended} for layer in range(2)]
    facts = {"arm": "sink-window", "selector": "sink-window", "seq_len": 2048, "total_density": 0.25,
             "heldout_loss": 2.75, "heldout_loss_dense": 2.5, "needle_last": 0.74, "needle_mid": 0.74}  # fmt: skip
    return {"schema_version": 1, "kind": "sparsering-evaluation", **facts, "readings": readings, "cells": cells,
            "reach": reach, **changes}  # fmt: skip


def write_everything(folder: Path) -> Path:
    """Write a folder with all kinds of files, and one that is none of ours."""
    trace = write_trace(folder / "trace", "vertical-slash", columns=48)
    masks, cluster = write_trace(folder / "masks"), write_cluster(folder / "cluster.yaml")
    write_plan(folder / "plan.json", masks, cluster)
    write_plan(folder / "other.json", trace, write_cluster(folder / "one-node.yaml", nodes=1, gpus=4))
    write_timelines(folder, folder / "plan.json", masks, cluster)
    write_metrics(folder / "planned")
    write_metrics(folder / "dense", steps=range(5), tokens_per_s=300.0, **DENSE)
    timelines = (folder / "simulated.json.gz", folder / "measured.json.gz")
    (folder / "validated.json").write_text(called("validate", *timelines, "--json"))
    config = {"model": {"path": "m"}, "data": {"folder": "d"}, "seq_len_tokens": 4096, "steps": 1000}
    (folder / "run.yaml").write_text(yaml_text(config))
    rows = [{"impl": f"kernel <{number}>", "layout": "ring", "forward_ms": 1.5 * number} for number in range(1, 5)]
    write_json(folder / "results.json", {"benchmark": "kernels", "date": "2026-01-01", "hardware": {}, "rows": rows})
    write_json(folder / "eval.json", evaluation(arm="window <1>"))
    (folder / "notes.txt").write_text("mine\n")
    return folder
