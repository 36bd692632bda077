"""Training runs, from the JSON lines that `train` writes into its folder of metrics: speed, loss, GPU-hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...traces.errors import InputError
from ...traces.files import open_regular, read_bytes
from ...traces.strict_json import parse_json
from ...traces.validation import validated

SNIFFED_BYTES = 1 << 16
MOST_METRICS_BYTES = 256 << 20
MOST_LINES = 1 << 18
MOST_LINE_VALUES = 1 << 20
MOST_DENSITIES = 1 << 23  # of all lines, which are kept; other lists are passed over
MARKS = {"rank", "step", "step_time_us", "tokens_per_s"}
US_PER_HOUR = 3.6e9


class MetricsLine(BaseModel):
    """One rank's values of one optimizer step; fields that are not read here are passed over.

    density_per_layer: empty where attention is dense by construction, as in the baselines.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    rank: int = Field(ge=0)
    step: int = Field(ge=0)
    loss: float | None = None
    step_time_us: float = Field(gt=0)
    tokens_per_s: float = Field(gt=0)
    attention_forward_ms: float | None = Field(default=None, ge=0)
    attention_backward_ms: float | None = Field(default=None, ge=0)
    exposed_communication_ms: float | None = Field(default=None, ge=0)
    mfu_actual: float | None = None
    density: float | None = None
    density_per_layer: tuple[float, ...] = ()
    kept_mass: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One folder of metrics. ranks: how many wrote. lines: rank 0's by step, with the slowest rank's time.

    A step that was done twice (a run that was resumed) counts once, as it was done last.
    """

    folder: Path
    ranks: int
    lines: tuple[MetricsLine, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name or str(self.folder)

    @property
    def sparse(self) -> bool:
        """Whether attention followed a plan's patterns; baselines attend to everything."""
        return any(line.density_per_layer for line in self.lines)

    @property
    def steady(self) -> tuple[MetricsLine, ...]:
        """The steps that speeds are taken from: all but the first, in which everything is compiled and allocated."""
        return self.lines[1:] or self.lines

    def middle(self, field: str) -> float | None:
        """Return the median of a field over the steady steps that have it, None where none has."""
        values = [value for line in self.steady if (value := getattr(line, field)) is not None]
        return float(median(values)) if values else None

    @property
    def steps(self) -> int:
        """Optimizer steps from the first recorded one to the last, recorded or not."""
        return self.lines[-1].step - self.lines[0].step + 1

    @property
    def gpu_hours(self) -> float:
        """Seconds × ranks / 3,600 of these steps; those that were not recorded count as the median of the others."""
        recorded = sum(line.step_time_us for line in self.lines)
        missing = self.steps - len(self.lines)
        return (recorded + missing * (self.middle("step_time_us") or 0.0)) * self.ranks / US_PER_HOUR

    @property
    def attention_us(self) -> float | None:
        """Median microseconds of attention, forward and backward, in a step."""
        both = [
            (line.attention_forward_ms + line.attention_backward_ms) * 1e3
            for line in self.steady
            if line.attention_forward_ms is not None and line.attention_backward_ms is not None
        ]
        return float(median(both)) if both else None


def metrics_lines(path: Path) -> list[MetricsLine]:
    """Return the lines of a file of training metrics, none where it is not one.

    A last line without its end, which a killed process leaves, does not count. InputError names a line that is wrong.
    """
    try:
        with open_regular(path) as file:
            first = _values(file.read(SNIFFED_BYTES).partition(b"\n")[0], path)
    except (OSError, InputError):
        return []
    if not isinstance(first, dict) or not first.keys() >= MARKS:
        return []
    *whole, _ = read_bytes(path, max_bytes=MOST_METRICS_BYTES).split(b"\n")
    if len(whole) > MOST_LINES:
        raise InputError(f"has {len(whole)} lines; at most {MOST_LINES} are read", source=path)
    lines, kept = [], 0
    for number, text in enumerate(whole, start=1):
        if text.strip():
            lines.append(_line(text, f"{path}: line {number}"))
            kept += len(lines[-1].density_per_layer)
        if kept > MOST_DENSITIES:
            raise InputError(f"has more than {MOST_DENSITIES} of them", source=path, field="density_per_layer")
    return lines


def _line(text: bytes, source: str) -> MetricsLine:
    return validated(MetricsLine, _values(text, source), source)


def _values(text: bytes, source: str | Path) -> Any:
    return parse_json(text, source, max_values=MOST_LINE_VALUES)


def training_runs(files: Mapping[Path, Sequence[MetricsLine]]) -> list[TrainingRun]:
    """Return one run for each folder, in the order of their names."""
    runs = []
    for folder in sorted({path.parent for path in files}):
        latest: dict[tuple[int, int], MetricsLine] = {}
        for path, lines in files.items():
            if path.parent == folder:
                latest |= {(line.step, line.rank): line for line in lines}
        if latest:
            ranks = {rank for _, rank in latest}
            runs.append(TrainingRun(folder=folder, ranks=len(ranks), lines=_by_step(latest)))
    return runs


def _by_step(latest: Mapping[tuple[int, int], MetricsLine]) -> tuple[MetricsLine, ...]:
    """Return the lowest rank's line of each step with the slowest rank's time."""
    steps: dict[int, list[MetricsLine]] = {}
    for (step, _), line in sorted(latest.items()):
        steps.setdefault(step, []).append(line)
    return tuple(
        lines[0].model_copy(update={"step_time_us": max(line.step_time_us for line in lines)})
        for _, lines in sorted(steps.items())
    )


def run_rows(runs: Sequence[TrainingRun]) -> list[dict[str, Any]]:
    """Return what the page's table says of each run, as plain values; None where a run does not say it."""
    return [
        {
            "name": run.name,
            "attention": "sparse" if run.sparse else "dense",
            "ranks": run.ranks,
            "steps": run.steps,
            "recorded": len(run.lines),
            "step_time_us": run.middle("step_time_us"),
            "attention_us": run.attention_us,
            "exposed_ms": run.middle("exposed_communication_ms"),
            "tokens_per_s": run.middle("tokens_per_s"),
            "mfu": run.middle("mfu_actual"),
            "density": run.middle("density"),
            "kept_mass": run.middle("kept_mass"),
            "loss": next((line.loss for line in reversed(run.lines) if line.loss is not None), None),
            "gpu_hours": run.gpu_hours,
        }
        for run in runs
    ]
