"""The measured points of a calibration on disk, kept case by case: one that was stopped goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from ...planner.cost.counts import LaunchCounts
from ...planner.cost.tables import LaunchPoint, MaskKind
from ...planner.schedule.schedule import Direction
from ...planner.specs import ModelShape, Strict
from ...traces.errors import InputError
from ...traces.files import read_json, write_json
from ...traces.validation import validated
from .points import Case

SCHEMA_VERSION = 1
MAX_BYTES = 1 << 25
MAX_VALUES = 1 << 20
MOST = 1 << 62  # of a count or of bytes: more is a mistake


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one set of prices is for: a backend, heads, blocks."""

    backend: str
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def model(self) -> ModelShape:
        """One layer of such heads."""
        return ModelShape(layers=1, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)


class _Counts(Strict):
    tile_pairs: int = Field(ge=0, le=MOST)
    column_tile_pairs: int = Field(ge=0, le=MOST)
    rows: int = Field(ge=0, le=MOST)
    longest_row: int = Field(ge=0, le=MOST)
    key_rows: int = Field(ge=0, le=MOST)
    longest_key_row: int = Field(ge=0, le=MOST)
    cells: int = Field(ge=0, le=MOST)


class _Mask(Strict):
    listed: bool
    documents: bool


class _Point(Strict):
    """A `LaunchPoint` in the file."""

    direction: Direction
    mask: _Mask
    counts: _Counts
    key_bytes: int = Field(ge=0, le=MOST)
    launch_us: float = Field(gt=0)
    resumed_us: float = Field(ge=0)
    fresh_us: float = Field(ge=0)
    host_us: float = Field(ge=0)
    fresh_host_us: float = Field(ge=0)


class _Entry(Strict):
    """One case's points; shape and case are compared with what is wanted, and nothing else is done with them."""

    shape: dict[str, Any]
    case: dict[str, Any]
    points: list[_Point]


class _Link(Strict):
    """A `LinkTimes` in the file."""

    transport: str
    bytes_each_way: tuple[int, ...]
    microseconds: tuple[float, ...]
    slowdown: float
    post_us: float


class _File(Strict):
    schema_version: int
    facts: dict[str, Any]
    entries: list[_Entry]
    links: list[_Link]


@dataclass(kw_only=True)
class RawPoints:
    """Points by shape and case, of one machine. facts: what must be equal for points to be used again."""

    path: Path
    facts: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, facts: dict[str, Any]) -> RawPoints:
        """Read what is there, or begin anew. InputError where a file is of another machine or other versions."""
        points = cls(path=path, facts=facts)
        if not path.exists():
            return points
        document = read_json(path, max_bytes=MAX_BYTES, max_values=MAX_VALUES)
        if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"is no file of schema version {SCHEMA_VERSION}", source=path, field="schema_version")
        if document.get("facts") != facts:
            raise InputError("is of another machine or of other versions; move it away", source=path, field="facts")
        found = validated(_File, document, path)
        points.entries = [entry.model_dump() for entry in found.entries]
        points.links = [link.model_dump() for link in found.links]
        return points

    def has(self, shape: Shape, case: Case) -> bool:
        """Whether a case was measured."""
        return any(entry["shape"] == asdict(shape) and entry["case"] == asdict(case) for entry in self.entries)

    def add(self, shape: Shape, case: Case, points: list[LaunchPoint]) -> None:
        """Keep what a case gave, and write the file."""
        found = [asdict(point) | {"mask": point.mask._asdict()} for point in points]
        self.entries.append({"shape": asdict(shape), "case": asdict(case), "points": found})
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, {"schema_version": SCHEMA_VERSION, "facts": self.facts, "entries": self.entries,
                               "links": self.links})  # fmt: skip

    def of_shape(self, shape: Shape) -> Iterator[LaunchPoint]:
        """Yield all points of a shape."""
        for entry in self.entries:
            if entry["shape"] == asdict(shape):
                for point in entry["points"]:
                    mask, counts = MaskKind(**point["mask"]), LaunchCounts(**point["counts"])
                    yield LaunchPoint(**{**point, "mask": mask, "counts": counts})
