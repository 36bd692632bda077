"""Measured values beside their predictions, read from result files of benchmarks and from pairs of timelines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ..traces.errors import InputError, shown, unknown_name
from ..traces.files import read_json
from ..traces.timeline import COMPUTE_STREAM, Timeline, from_chrome
from ..traces.validation import validated
from .metrics import timeline_metrics

Quantity = Literal["forward", "backward", "step", "memory", "phase"]
QUANTITIES: tuple[Quantity, ...] = ("forward", "backward", "step", "memory", "phase")
LEAST, MOST = 1e-9, 1e18  # microseconds, milliseconds or bytes: what is not between them is a mistake
# Fields of a row that say which workload it is, the first three of them at least.
NEEDED = ("seq_len", "heads", "world_size")
WORKLOAD = (*NEEDED, "kv_heads", "head_dim", "dtype", "mask", "density", "columns", "seed", "nodes", "predicted_for")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measured value beside what was predicted: microseconds, or bytes of memory.

    group: the workload for which this configuration is one of several, None where the file does not say; spread: of
    the repeats, relative; calibration: the prediction was fitted to it; rank, phase, direction: of a phase's compute.
    """

    quantity: Quantity
    source: str
    configuration: str
    measured: float
    predicted: float
    group: str | None = None
    spread: float = 0.0
    calibration: bool = False
    direction: str | None = None
    rank: int | None = None
    phase: int | None = None

    @property
    def error(self) -> float:
        """The prediction over what was measured, less 1."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """What was read. one_sided: phases of a rank that compute in one of two timelines only, and are left out."""

    rows: tuple[Comparison, ...]
    one_sided: int = 0


class _Row(BaseModel):
    """The fields that are read of a row; others are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


class _Timed(_Row):
    """Of `fidelity` and `phases`."""

    configuration: str = Field(min_length=1)
    measured_us: float = Field(ge=LEAST, le=MOST)
    predicted_us: float = Field(ge=LEAST, le=MOST)
    spread: float | None = Field(default=None, ge=0, le=1)
    calibration: bool = False


class _Fidelity(_Timed):
    direction: Literal["forward", "backward", "step"]
    measured_bytes: float | None = Field(default=None, ge=LEAST, le=MOST)
    predicted_bytes: float | None = Field(default=None, ge=LEAST, le=MOST)


class _Phase(_Timed):
    direction: Literal["forward", "backward"] | None = None
    rank: int = Field(ge=0)
    phase: int = Field(ge=0)


class _Layer(_Row):
    """Of `ring` and `rank`; rows of rings without a plan have no predictions."""

    impl: str
    layout: str
    transport: str = "p2p"
    spread: float | None = Field(default=None, ge=0, le=1)
    calibration: bool = False
    forward_ms: float | None = Field(default=None, ge=LEAST, le=MOST)
    backward_ms: float | None = Field(default=None, ge=LEAST, le=MOST)
    step_ms: float | None = Field(default=None, ge=LEAST, le=MOST)
    peak_bytes: float | None = Field(default=None, ge=LEAST, le=MOST)
    predicted_forward_ms: float | None = Field(default=None, ge=LEAST, le=MOST)
    predicted_backward_ms: float | None = Field(default=None, ge=LEAST, le=MOST)
    predicted_step_ms: float | None = Field(default=None, ge=LEAST, le=MOST)
    predicted_peak_bytes: float | None = Field(default=None, ge=LEAST, le=MOST)


def read_comparisons(paths: Sequence[Path], *, spread: float) -> Comparisons:
    """Read result files and timelines; timelines are matched by the digest of their plan.

    spread: relative, of rows that state none. Raises InputError for a file that is neither, that holds nothing to
    compare, or whose values are no positive finite numbers, and for timelines without a partner.
    """
    rows: list[Comparison] = []
    timelines: list[tuple[Path, Timeline]] = []
    for path in dict.fromkeys(paths):
        document = read_json(path)
        if isinstance(document, dict) and "traceEvents" in document:
            timelines.append((path, from_chrome(document, source=path)))
        else:
            found = [*_result_rows(document, path, spread)]
            if not found:
                raise InputError("holds no row with a measured value and its prediction", source=path)
            rows += found
    one_sided = 0
    for simulated, measured in _pairs(timelines):
        found, left_out = _compared(simulated, measured, spread)
        rows, one_sided = [*rows, *found], one_sided + left_out
    return Comparisons(rows=tuple(rows), one_sided=one_sided)


def _result_rows(document: Any, path: Path, spread: float) -> Iterable[Comparison]:
    if not isinstance(document, dict) or not isinstance(document.get("benchmark"), str):
        raise InputError("is neither a result file of a benchmark nor a timeline", source=path)
    kind, raw = document["benchmark"], document.get("rows")
    readers = {"ring": _layer_rows, "rank": _layer_rows, "fidelity": _fidelity_rows, "phases": _phase_rows}
    if kind not in readers:
        raise unknown_name(kind, readers, source=path, field="benchmark")
    if not isinstance(raw, list) or not all(isinstance(row, dict) for row in raw):
        raise InputError("must be a list of objects", source=path, field="rows")
    found = [one for number, row in enumerate(raw) for one in readers[kind](row, f"{path}: rows.{number}", spread)]
    unique = dict.fromkeys(replace(one, source=path.name) for one in found)  # memory stands in rows of each direction
    return _slowest_ranks(unique) if kind == "rank" else unique


def _layer_rows(raw: dict[str, Any], source: str, spread: float) -> Iterator[Comparison]:
    row = validated(_Layer, raw, source)
    own = _common(row, raw, source, spread, " ".join([row.impl, row.layout, row.transport]))
    forward, backward = row.predicted_forward_ms, row.predicted_backward_ms
    step = row.predicted_step_ms or (forward + backward if forward and backward else None)
    found: tuple[tuple[Quantity, float | None, float | None, float], ...] = (
        ("forward", row.forward_ms, forward, 1e3),
        ("backward", row.backward_ms, backward, 1e3),
        ("step", row.step_ms, step, 1e3),
        ("memory", row.peak_bytes, row.predicted_peak_bytes, 1.0),
    )
    for quantity, measured, predicted, scale in found:
        if measured is not None and predicted is not None:
            yield Comparison(quantity=quantity, measured=measured * scale, predicted=predicted * scale, **own)


def _fidelity_rows(raw: dict[str, Any], source: str, spread: float) -> Iterator[Comparison]:
    row = validated(_Fidelity, raw, source)
    own = _common(row, raw, source, spread, row.configuration)
    yield Comparison(quantity=row.direction, measured=row.measured_us, predicted=row.predicted_us, **own)
    if row.measured_bytes is not None and row.predicted_bytes is not None:
        yield Comparison(quantity="memory", measured=row.measured_bytes, predicted=row.predicted_bytes, **own)


def _phase_rows(raw: dict[str, Any], source: str, spread: float) -> Iterator[Comparison]:
    row = validated(_Phase, raw, source)
    own = _common(row, raw, source, spread, row.configuration)
    place = {"direction": row.direction, "rank": row.rank, "phase": row.phase}
    yield Comparison(quantity="phase", measured=row.measured_us, predicted=row.predicted_us, **own, **place)


def _common(
    row: _Timed | _Layer, raw: dict[str, Any], source: str, spread: float, configuration: str
) -> dict[str, Any]:
    known = all(raw.get(name) is not None for name in NEEDED)
    stated = [f"{name} {raw[name]}" for name in WORKLOAD if raw.get(name) is not None]
    return {
        "source": source,
        "configuration": configuration,
        "group": ", ".join(stated) if known else None,
        "spread": spread if row.spread is None else row.spread,
        "calibration": row.calibration,
    }


def _slowest_ranks(rows: Iterable[Comparison]) -> Iterable[Comparison]:
    """Take rows of the same plan, measured on some of its ranks each, as one: the slowest (the fullest) of them."""
    found: dict[tuple[Any, ...], Comparison] = {}
    for one in rows:
        key = one.quantity, one.configuration, one.group, one.calibration
        found[key] = max(one, found.get(key, one), key=lambda row: row.measured)
    return found.values()


def _pairs(timelines: Sequence[tuple[Path, Timeline]]) -> Iterator[tuple[tuple[Path, Timeline], tuple[Path, Timeline]]]:
    """Yield each measured timeline with the simulated one of the same plan."""
    simulated: dict[str, tuple[Path, Timeline]] = {}
    measured: list[tuple[str, tuple[Path, Timeline]]] = []
    for path, timeline in timelines:
        digest = timeline.plan_digest
        if digest is None:
            raise InputError("does not say its plan's digest", source=path, field="metadata.plan_digest")
        if timeline.source == "measured":
            measured.append((digest, (path, timeline)))
        elif digest in simulated:
            raise InputError(f"is of the same plan as {simulated[digest][0]}: give one of the two", source=path)
        else:
            simulated[digest] = path, timeline
    partnered = {digest for digest, _ in measured}
    for digest, (path, _) in simulated.items():
        if digest not in partnered:
            raise InputError(f"no measured timeline of its plan {shown(digest)} is given", source=path)
    for digest, (path, timeline) in measured:
        if digest not in simulated:
            raise InputError(f"no simulated timeline of its plan {shown(digest)} is given", source=path)
        yield simulated[digest], (path, timeline)


def _compared(
    simulated: tuple[Path, Timeline], measured: tuple[Path, Timeline], spread: float
) -> tuple[list[Comparison], int]:
    """Return makespans and every rank's compute in every phase; and how many of these have one side only."""
    (other, predicted), (path, found) = simulated, measured
    if predicted.world_size != found.world_size:
        raise InputError(f"has {found.world_size} ranks, {other} has {predicted.world_size}", source=path)
    digest = found.plan_digest or ""  # never empty: by it the two were paired
    own = {"source": path.name, "configuration": f"plan {digest[:12]}", "spread": spread}
    spans = {one.direction: one.makespan_us for one in _metrics(path, found)}
    expected = {one.direction: one.makespan_us for one in _metrics(other, predicted)}
    if spans.keys() != expected.keys():
        raise InputError(f"holds {' and '.join(spans)}, {other} {' and '.join(expected)}", source=path)
    times: list[tuple[Quantity, float, float]] = [
        ("forward" if way == "forward" else "backward", us, expected[way]) for way, us in spans.items()
    ]
    if len(spans) > 1:
        times.append(("step", found.makespan_us, predicted.makespan_us))
    rows = []
    for quantity, us, expected_us in times:
        if not (0 < us <= MOST and 0 < expected_us <= MOST):
            raise InputError(f"{quantity} takes {us:g} µs, in {other} {expected_us:g} µs", source=path)
        rows.append(Comparison(quantity=quantity, measured=us, predicted=expected_us, **own))
    one_sided = 0
    for way in spans:
        mine, theirs = _compute(found, way), _compute(predicted, way)
        shape = tuple(np.maximum(mine.shape, theirs.shape))
        mine, theirs = _padded(mine, shape), _padded(theirs, shape)
        one_sided += int(((mine > 0) != (theirs > 0)).sum())
        for rank, phase in zip(*np.nonzero((mine > 0) & (theirs > 0)), strict=True):
            times_us = {"measured": float(mine[rank, phase]), "predicted": float(theirs[rank, phase])}
            place = {"direction": way, "rank": int(rank), "phase": int(phase)}
            rows.append(Comparison(quantity="phase", **times_us, **own, **place))
    return rows, one_sided


def _metrics(path: Path, timeline: Timeline) -> Any:
    try:
        return timeline_metrics(timeline)
    except InputError as error:
        raise InputError(str(error), source=path) from error


def _compute(timeline: Timeline, direction: str) -> NDArray[np.float64]:
    """Return float64 [ranks, phases]: microseconds of compute."""
    spans = [one for one in timeline.spans if one.stream == COMPUTE_STREAM and one.direction == direction]
    found = np.zeros((timeline.world_size, 1 + max((one.phase for one in spans), default=0)))
    for span in spans:
        found[span.rank, span.phase] += span.duration_us
    return found


def _padded(values: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.pad(values, [(0, most - size) for most, size in zip(shape, values.shape, strict=True)])


def finite_share(text: str, field: str) -> float:
    """Return text as a finite number that is not negative; InputError names the field."""
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"{shown(text)} is no number", field=field) from error
    if not 0.0 <= value < math.inf:
        raise InputError(f"must be 0 or more and finite, not {shown(text)}", field=field)
    return value
