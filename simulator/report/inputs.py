"""Which files there are to report on, known by what they hold and not by their names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...planner.cost.cluster import MAX_CLUSTER_BYTES, Cluster, load_cluster, parse_cluster, preset_names
from ...planner.plan import Plan, load_plan
from ...planner.predicted import check_predictions
from ...traces.dataset.manifest import MANIFEST_NAME
from ...traces.dataset.store import Trace
from ...traces.errors import InputError
from ...traces.files import (
    GZIP_MAGIC,
    canonical_json,
    open_regular,
    read_bytes,
    read_json,
    sha256_of_bytes,
    sha256_of_file,
)
from ...traces.timeline import Timeline, from_chrome
from ...traces.validation import validated
from ...traces.yaml_files import read_yaml
from .evaluation import EVALUATION_KIND, Evaluation
from .training import MARKS, TrainingRun, metrics_lines, training_runs

GENERATOR = '<meta name="generator" content="sparsering">'
MOST_FILES = 20_000
METRICS = "training metrics"
TRACE_KIND = "sparsering-trace"
DEMO_KIND = "sparsering-demo"
YAML_MARKS = b"gpus_per_node", b"seq_len_tokens"  # of clusters, of configurations of training runs
YAML_SUFFIXES = ".yaml", ".yml"


class ValidatedErrors(BaseModel):
    """The errors of one quantity, shares, as `validate --json` prints them."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    rows: int
    median: float
    p95: float
    max: float
    bias: float


class ValidatedQuantity(BaseModel):
    """One quantity of what `validate --json` prints; fields that are not read here are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    errors: ValidatedErrors | None = None


class Validation(BaseModel):
    """What `validate --json` prints, as far as it is read here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    quantities: dict[str, ValidatedQuantity]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file (or a trace's folder) that the page is made of. digest: SHA-256 of its bytes, of a trace its own."""

    path: Path
    kind: str
    digest: str


@dataclass(kw_only=True, eq=False)
class Inputs:
    """Everything that was found, by kind and in the order of the paths; `sources` names the files of all of it.

    results: files of benchmarks; validations: what `validate --json` printed; evaluations: what `eval` wrote; unknown:
    files that are none of ours.
    """

    traces: list[Trace] = field(default_factory=list)
    plans: list[tuple[Path, Plan]] = field(default_factory=list)
    timelines: list[tuple[Path, Timeline]] = field(default_factory=list)
    clusters: list[tuple[Path, Cluster]] = field(default_factory=list)
    validations: list[tuple[Path, Validation]] = field(default_factory=list)
    results: list[tuple[Path, Mapping[str, Any]]] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    evaluations: list[tuple[Path, Evaluation]] = field(default_factory=list)
    planned_steps: int | None = None
    sources: list[Source] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)

    def trace_of(self, plan: Plan) -> Trace | None:
        """Return the trace that a plan was made for."""
        wanted = plan.pattern.trace_sha256 or plan.provenance.get("trace_sha256")
        return next((trace for trace in self.traces if trace.digest() == wanted), None)

    def cluster_of(self, plan: Plan) -> Cluster | None:
        """Return the cluster that a plan was made for: a file that was found, or a preset; the same to the byte."""
        wanted = plan.provenance.get("cluster_sha256")
        presets = (load_cluster(name) for name in preset_names() if name == plan.provenance.get("cluster"))
        found = (*(cluster for _, cluster in self.clusters), *presets)
        return next((one for one in found if cluster_digest(one) == wanted), None)

    def timeline_of(self, plan: Plan, source: str) -> Timeline | None:
        """Return the simulated or the measured timeline of a plan."""
        wanted = (line for _, line in self.timelines if line.plan_digest == plan.digest)
        return next((line for line in wanted if line.source == source), None)


def cluster_digest(cluster: Cluster) -> str:
    """Return the SHA-256 by which plans name their cluster."""
    return sha256_of_bytes(canonical_json(cluster.model_dump(mode="json")))


def read_inputs(paths: Sequence[Path], *, output: Path | None = None) -> Inputs:
    """Read all files that are known of these files and folders. output: the page itself, which is passed over.

    Raises InputError for a path that does not exist, for a file of ours that is damaged, and where nothing is known.
    """
    found, lines = Inputs(), {}
    for path in dict.fromkeys(found_path for given in paths for found_path in _files(given)):
        if output is not None and path.resolve() == output.resolve():
            continue
        if path.is_dir():
            trace = Trace.open(path)
            found.traces.append(trace)
            found.sources.append(Source(path=path, kind="trace", digest=trace.digest()))
        else:
            _read_file(path, found, lines)
    found.runs = training_runs(lines)
    found.sources = _gathered(found.sources)
    if not found.sources:
        told = f"{len(found.unknown)} files, none of them" if found.unknown else "no file that is"
        named = ", ".join(str(path) for path in paths)
        raise InputError(
            f"{told} a trace, plan, timeline, training metrics, evaluation or result of sparsering", source=named
        )
    return found


def _gathered(sources: Sequence[Source]) -> list[Source]:
    """Return the sources, the metrics of a folder, one file a rank, as one: its digest is that of theirs."""
    folders: dict[Path, list[str]] = {}
    for source in sources:
        if source.kind == METRICS:
            folders.setdefault(source.path.parent, []).append(source.digest)
    rest = [source for source in sources if source.kind != METRICS]
    return rest + [
        Source(path=folder, kind=f"{METRICS} of {len(own)} ranks", digest=sha256_of_bytes("".join(own).encode()))
        for folder, own in folders.items()
    ]


def _files(given: Path) -> Iterator[Path]:
    """Yield the files below a path, and the folders that are traces, which are not looked into."""
    if not given.exists():
        raise InputError("does not exist", source=given)
    if not given.is_dir():
        yield given
        return
    count = 0
    for folder, folders, names in os.walk(given):
        here = Path(folder)
        if _is_trace(here):
            folders.clear()
            yield here
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                count += 1
                if count > MOST_FILES:
                    raise InputError(f"holds more than {MOST_FILES} files; name those that count", source=given)
                yield here / name


def _is_trace(folder: Path) -> bool:
    manifest = folder / MANIFEST_NAME
    return manifest.is_file() and _object(manifest).get("kind") == TRACE_KIND


def _read_file(path: Path, found: Inputs, lines: dict[Path, list[Any]]) -> None:
    """Put a file where it belongs, by what it holds."""
    if not path.is_file() or _is_page(path):
        return
    document, kind = _object(path), None
    if "traceEvents" in document and "schema_version" in _part(document, "otherData"):
        timeline = from_chrome(document, source=path)
        found.timelines.append((path, timeline))
        kind = f"{timeline.source} timeline"
    elif {"placement", "forward", "backward", "kernels", "digest"} <= document.keys():
        plan = load_plan(path)
        check_predictions(plan.predictions, path)
        found.plans.append((path, plan))
        kind = "plan"
    elif isinstance(document.get("quantities"), dict) and {"phases", "missed"} <= document.keys():
        found.validations.append((path, validated(Validation, document, path)))
        kind = "validation"
    elif isinstance(document.get("benchmark"), str) and isinstance(document.get("rows"), list):
        found.results.append((path, document))
        kind = f"results of the benchmark {document['benchmark']}"
    elif document.get("kind") == EVALUATION_KIND:
        found.evaluations.append((path, validated(Evaluation, document, path)))
        kind = "evaluation"
    elif document.get("kind") == DEMO_KIND:
        kind = "record of the demo"
    elif not document or document.keys() >= MARKS:
        kind = _read_text(path, found, lines)
    if kind is None:
        found.unknown.append(path)
    else:
        found.sources.append(Source(path=path, kind=kind, digest=sha256_of_file(path)))


def _read_text(path: Path, found: Inputs, lines: dict[Path, list[Any]]) -> str | None:
    """Read training metrics, clusters and configurations of training runs; return the kind, None for anything else."""
    if metrics := metrics_lines(path):
        lines[path] = metrics
        return METRICS
    document = _mapping(path)
    if {"gpus_per_node", "intra_node", "origin"} <= document.keys():
        found.clusters.append((path, parse_cluster(document, source=path)))
        return "cluster"
    steps = document.get("steps")
    if {"model", "data", "seq_len_tokens"} <= document.keys() and type(steps) is int and steps > 0:
        found.planned_steps = max(found.planned_steps or 0, steps)
        return "configuration of a training run"
    return None


def _is_page(path: Path) -> bool:
    with open_regular(path) as file:
        return GENERATOR.encode() in file.read(1000)


def _object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, compressed or not; an empty one where it holds none."""
    try:
        with open_regular(path) as file:
            start = file.read(2)
        if start != GZIP_MAGIC and not start.lstrip().startswith(b"{"):
            return {}
        document = read_json(path)
    except (OSError, InputError):
        return {}
    return document if isinstance(document, dict) else {}


def _part(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def _mapping(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, an empty one where it holds none, or was meant to be JSON."""
    try:
        data = read_bytes(path, max_bytes=MAX_CLUSTER_BYTES)
        if not any(mark in data for mark in YAML_MARKS):
            return {}
        if data.lstrip().startswith(b"{") and path.suffix not in YAML_SUFFIXES:  # JSON that is none, read slowly
            return {}
        document = read_yaml(path, max_bytes=MAX_CLUSTER_BYTES)
    except InputError:
        return {}
    return document if isinstance(document, dict) else {}
