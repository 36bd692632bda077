"""The plan file: placement, schedules, pattern and kernel settings, predictions and a digest, as strict JSON.

The digest is the SHA-256 of the canonical JSON without `digest`, `predictions` and `provenance`: two plans with the
same digest make ranks do the same. Loading proves the digest and that this version still expands the named layouts to
the same schedules.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, StrictBool, StrictInt

from ..traces.errors import InputError
from ..traces.files import canonical_json, read_json, sha256_of_bytes, write_json
from ..traces.pattern import LayerPattern, num_blocks
from ..traces.validation import validated
from .layouts.layout import Layout
from .layouts.registry import make_layout
from .schedule.backends import computed_head_dim, require_elements
from .schedule.heads import HeadOrder, is_order
from .schedule.pairs import Pairs, pattern_pairs
from .schedule.placement import Placement
from .schedule.schedule import DIRECTIONS, Direction, Schedule
from .schedule.shape import AttentionShape
from .specs import (
    MODEL,
    SHA256,
    AttentionSpec,
    KernelSpec,
    ModelShape,
    PatternSpec,
    PlacementSpec,
    Strict,
    TunedLaunches,
)

PLAN_SCHEMA_VERSION = 1
MAX_PLAN_BYTES = 64 << 20
MAX_PLAN_VALUES = 4 << 20
MAX_LAUNCHES_BYTES = 1 << 20
UNDIGESTED = {"digest", "predictions", "provenance"}
RECORD = "record_sha256"  # in the file only: SHA-256 of predictions and provenance


class LayoutSpec(Strict):
    """A layout by name and all its parameters, and the SHA-256 of the schedule that it expands to."""

    layout: str
    parameters: dict[str, StrictBool | StrictInt]
    schedule_sha256: str = Field(pattern=SHA256)

    @classmethod
    def of(cls, layout: Layout) -> Self:
        """Return a layout as the file states it, the hash of its schedule still to come."""
        return cls(layout=layout.name, parameters=layout.parameters, schedule_sha256="0" * 64)

    @property
    def value(self) -> Layout:
        """The layout; InputError, naming the field and its value, where no layout is registered that fits."""
        return make_layout(self.layout, self.parameters)


class Plan(AttentionSpec):
    """One file that says what every rank does. Build with `make_plan`, read with `load_plan`.

    pairs: rows of 0 and 1, the (query part, key part) pairs that are computed (see `Pairs`); None: all of them.
    head_orders: by layer, the order in which query heads are dealt out to head groups (see `heads`); None: as they are.
    """

    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    placement: PlacementSpec
    forward: LayoutSpec
    backward: LayoutSpec
    pattern: PatternSpec
    kernels: KernelSpec
    pairs: tuple[str, ...] | None = None
    head_orders: tuple[tuple[int, ...], ...] | None = None
    predictions: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    digest: str = Field(default="", pattern="^([0-9a-f]{64})?$")

    @property
    def world_size(self) -> int:
        """Ranks that the plan is for."""
        return self.placement.world_size

    def compute_digest(self) -> str:
        """Return the SHA-256 of everything that decides what ranks do."""
        return sha256_of_bytes(canonical_json(self.model_dump(mode="json", exclude=UNDIGESTED)))

    def active_pairs(self) -> Pairs:
        """Return the (query part, key part) pairs that are computed."""
        return Pairs.all_of(self.world_size) if self.pairs is None else Pairs(rows=self.pairs)

    def attention_shape(self) -> AttentionShape:
        """Return the sizes that the schedules are built from."""
        units = len(self.placement.units) // self.world_size
        return self.shape_of(world_size=self.world_size, tokens_per_rank=units * self.placement.granularity_tokens)

    def require_kernels(self) -> None:
        """Refuse what the plan's kernels do not compute: UnsupportedError names the field, its value, what is taken."""
        computed_head_dim(
            self.kernels.backend, head_dim=self.model.head_dim, dtype=self.dtype, block_size=self.block_size
        )
        for field, value in self.asked_of_elements():
            require_elements(self.kernels.backend, field=field, value=value)

    def asked_of_elements(self) -> list[tuple[str, object]]:
        """Return (field, value) of what asks for more than whole blocks of plain scores: windows and softcaps."""
        asked: list[tuple[str, object]] = []
        if self.pattern.windowed:
            asked.append(("pattern.windowed", True))
        return asked + self.model.asked_of_elements(self.seq_len_tokens)

    def head_order(self, layer: int | None) -> HeadOrder | None:
        """Return the order of a layer's query heads, None where they stay as they are. InputError names the layer."""
        if self.head_orders is None:
            return None
        if layer is None or not 0 <= layer < len(self.head_orders):
            raise InputError(
                f"is {layer}; the plan has orders of heads for {len(self.head_orders)} layers", field="layer"
            )
        order = self.head_orders[layer]
        return None if order == tuple(range(self.model.heads)) else order

    def make_placement(self) -> Placement:
        """Return the placement; InputError when the units are no permutation or do not cover the sequence."""
        if len(self.placement.units) % self.world_size:
            raise InputError(f"{len(self.placement.units)} units over {self.world_size} ranks", field="placement.units")
        return Placement(
            name=self.placement.name,
            seq_len_tokens=self.seq_len_tokens,
            granularity_tokens=self.placement.granularity_tokens,
            units=np.array(self.placement.units, dtype=np.int64).reshape(self.world_size, -1),
        )

    def spec(self, direction: Direction) -> LayoutSpec:
        """Return what the plan says of one direction."""
        return self.forward if direction == "forward" else self.backward

    def schedule(self, direction: Direction) -> Schedule:
        """Expand the schedule of one direction; InputError when it is not the one that was planned."""
        spec, schedule = self.spec(direction), self.build_schedule(direction)
        if schedule.sha256() != spec.schedule_sha256:
            raise InputError(
                f"layout {spec.value} no longer expands to the schedule that was planned",
                field=f"{direction}.schedule_sha256",
            )
        return schedule

    def build_schedule(self, direction: Direction) -> Schedule:
        """Expand the schedule of one direction, whatever its hash.

        InputError, naming the direction and what is wrong, where the layout is none or does not apply.
        """
        try:
            return built_schedule(self.spec(direction).value, self.attention_shape(), direction, self.active_pairs())
        except InputError as error:
            raise type(error)(str(error), field=direction) from error

    def with_record(
        self, *, predictions: dict[str, Any] | None = None, provenance: dict[str, Any] | None = None
    ) -> Self:
        """Return the plan, its digest the same, with what was predicted of it and how it came about."""
        return self.model_copy(update={"predictions": predictions or {}, "provenance": provenance or {}})

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically; `record_sha256` guards what the digest does not cover."""
        document = self.model_dump(mode="json")
        write_json(path, document | {RECORD: _record_sha256(document)})

    def require(self, *, world_size: int | None = None, model: ModelShape | None = None,
                seq_len_tokens: int | None = None, dtype: str | None = None) -> None:  # fmt: skip
        """Refuse, before any work, a run that the plan was not made for: InputError names the field and both values."""
        wanted = {"world_size": world_size, "model": model, "seq_len_tokens": seq_len_tokens, "dtype": dtype}
        for field, value in wanted.items():
            planned = getattr(self, field)
            if value is not None and value != planned:
                if isinstance(value, ModelShape) and (differing := planned.difference(value)):
                    name, here, there = differing
                    raise InputError(f"the plan is for {here}, not for {there}", field=f"{field}.{name}")
                raise InputError(f"the plan is for {planned}, not for {value}", field=field)

    def require_covered(self, pattern: LayerPattern, *, about: str = "the pattern") -> None:
        """Refuse a pattern that activates a pair of shards which the plan leaves out: InputError names the pair."""
        if self.pairs is not None:
            self.active_pairs().require(pattern_pairs(pattern, self.make_placement()), about=about)


@lru_cache(maxsize=32)
def built_schedule(layout: Layout, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
    """Return the schedule of a layout: the same object each time, since expanding and hashing it takes long."""
    return layout.build(shape=shape, direction=direction, pairs=pairs)


def make_plan(
    *,
    attention: AttentionSpec,
    placement: Placement,
    forward: Layout,
    backward: Layout | None = None,
    pattern: PatternSpec,
    kernels: KernelSpec,
    pairs: Pairs | None = None,
    head_orders: tuple[HeadOrder, ...] | None = None,
) -> Plan:
    """Build a plan, expand its schedules for their hashes, and seal it with its digest.

    backward: its layout; None: that of forward. pairs: those that may have work; None: all. head_orders: by layer.
    UnsupportedError where the kernels named do not take the head dim, type or block size, or a layout not the sizes;
    InputError where an order tears the query heads of a K/V head apart.
    """
    plan = Plan(
        **dict(attention),
        placement=PlacementSpec(
            name=placement.name,
            world_size=placement.world_size,
            granularity_tokens=placement.granularity_tokens,
            units=tuple(placement.units.reshape(-1).tolist()),
        ),
        forward=LayoutSpec.of(forward),
        backward=LayoutSpec.of(backward or forward),
        pattern=pattern,
        kernels=kernels,
        pairs=None if pairs is None or pairs.complete else pairs.rows,
        head_orders=head_orders,
    )
    plan.require_kernels()
    _check_orders(plan)
    _check_layers(plan)
    hashes = {direction: plan.build_schedule(direction).sha256() for direction in DIRECTIONS}
    plan = plan.model_copy(
        update={way: plan.spec(way).model_copy(update={"schedule_sha256": hashes[way]}) for way in DIRECTIONS}
    )
    return plan.model_copy(update={"digest": plan.compute_digest()})


def load_launches(path: Path) -> TunedLaunches:
    """Read what `sparsering doctor --kernels --tune` wrote. InputError names file, field and value."""
    return validated(TunedLaunches, read_json(path, max_bytes=MAX_LAUNCHES_BYTES), path)


def load_plan(path: Path | str) -> Plan:
    """Read and verify a plan file: schema, digest, permutation, kernels. InputError names file, field and value."""
    path = Path(path)
    document = read_json(path, max_bytes=MAX_PLAN_BYTES, max_values=MAX_PLAN_VALUES, exact=True)
    record = document.pop(RECORD, None) if isinstance(document, dict) else None
    plan = validated(Plan, document, path, newest_schema=PLAN_SCHEMA_VERSION)
    if plan.digest != plan.compute_digest():
        raise InputError(f"does not match the content (computed {plan.compute_digest()})", source=path, field="digest")
    if record != (computed := _record_sha256(plan.model_dump(mode="json"))):
        raise InputError(f"does not match predictions and provenance (computed {computed})", source=path, field=RECORD)
    _check_contents(plan, path)
    return plan


def _record_sha256(document: dict[str, Any]) -> str:
    return sha256_of_bytes(canonical_json({name: document[name] for name in ("predictions", "provenance")}))


def _check_orders(plan: Plan) -> None:
    orders, model = plan.head_orders, plan.model
    if orders is not None and len(orders) != model.layers:
        raise InputError(f"are of {len(orders)} layers, not {model.layers}", field="head_orders")
    for layer, order in enumerate(orders or ()):
        if not is_order(order, heads=model.heads, kv_heads=model.kv_heads):
            raise InputError(f"{list(order)} is no order of whole K/V heads", field=f"head_orders.{layer}")


def _check_layers(plan: Plan) -> None:
    """Refuse patterns by layer that are not of the model's layers, or not its own where it has some of its own."""
    by_layer, model = plan.pattern.by_layer, plan.model
    if by_layer is None:
        return
    if len(by_layer) != model.layers:
        raise InputError(f"are of {len(by_layer)} layers, not of {model.layers}", field="pattern.by_layer")
    for layer, one in enumerate(by_layer):
        own = model.limits(layer, plan.seq_len_tokens)
        if (one.selector == MODEL) != bool(own) or (own and one.settings != own):
            told = f"is {one.selector} {one.settings}; the model itself limits the layer to {own or 'nothing'}"
            raise InputError(told, field=f"pattern.by_layer.{layer}")


def _check_contents(plan: Plan, path: Path) -> None:
    try:
        plan.require_kernels()
        plan.make_placement()
        if plan.active_pairs().world_size != plan.world_size:
            raise InputError(f"are of {plan.active_pairs().world_size} ranks, not {plan.world_size}", field="pairs")
        for direction in DIRECTIONS:
            plan.build_schedule(direction)
        _check_orders(plan)
        _check_layers(plan)
        if plan.columns_capacity > num_blocks(plan.seq_len_tokens, plan.block_size) * plan.block_size:
            raise InputError(f"{plan.columns_capacity} exceeds the sequence", field="columns_capacity")
    except InputError as error:
        raise type(error)(str(error), source=path) from error
