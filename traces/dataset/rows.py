"""One row per (training step, layer, head): between patterns in memory and Arrow tables on disk.

Decoding trusts nothing: every value is checked against the header before it becomes a pattern, and the first one that
does not fit is named with file, layer, head and field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import InputError
from ..pattern import BlockMask, HeadPattern, LayerPattern, VerticalSlash, num_blocks
from .manifest import TraceHeader

VERTICAL_SLASH = "vertical-slash"
BLOCK_MASK = "block-mask"
MAX_SETTINGS_BYTES = 4096
MASS_SLACK = 1e-6

SCHEMA = pa.schema(
    [
        pa.field("training_step", pa.int64(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("head", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("selector", pa.string(), nullable=False),
        pa.field("settings", pa.string(), nullable=False),
        pa.field("columns", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("diagonals", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("block_bits", pa.binary()),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("kept_mass_probe", pa.float64()),
        pa.field("kept_mass_sampled", pa.float64()),
    ]
)
LIST_LEAVES = ("columns.list.element", "diagonals.list.element")


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """How one head's pattern was chosen and how much attention it keeps.

    selector:          name of the selector or generator
    settings:          its settings, plain JSON values
    kept_mass_probe:   mean share of attention kept for the queries that chose, 0 to 1; None when not measured
    kept_mass_sampled: the same for seeded rows over the whole sequence
    """

    selector: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kept_mass_probe: float | None = None
    kept_mass_sampled: float | None = None

    def __post_init__(self) -> None:
        if not self.selector:
            raise InputError("must not be empty", field="selector")
        for name in ("kept_mass_probe", "kept_mass_sampled"):
            _check_mass(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """One row of a trace, checked."""

    training_step: int
    layer: int
    head: int
    pattern: HeadPattern
    choice: HeadChoice
    density: float


def head_density(pattern: HeadPattern, blocks: int) -> float:
    """Return one head's active causal blocks over N(N+1)/2; columns excluded."""
    return pattern.count_active_blocks(blocks) / (blocks * (blocks + 1) / 2)


def pack_bits(bits: NDArray[np.bool_]) -> bytes:
    """Return the lower triangle of bool [N, N], row by row, eight pairs a byte, the first in the highest bit."""
    return np.packbits(bits[np.tri(bits.shape[0], dtype=bool)]).tobytes()


def unpack_bits(data: bytes, blocks: int) -> NDArray[np.bool_]:
    """Return bool [N, N] from `pack_bits`; InputError when the length or the unused last bits are wrong."""
    pairs = blocks * (blocks + 1) // 2
    if len(data) != packed_bytes(blocks):
        raise InputError(f"is {len(data)} bytes, {packed_bytes(blocks)} are needed for {blocks} blocks")
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).astype(bool)
    if flat[pairs:].any():
        raise InputError(f"has bits beyond the {pairs} block pairs")
    bits = np.zeros((blocks, blocks), dtype=bool)
    bits[np.tri(blocks, dtype=bool)] = flat[:pairs]
    return bits


def packed_bytes(blocks: int) -> int:
    """Return the bytes of one head's packed block bits."""
    return -(-(blocks * (blocks + 1) // 2) // 8)


def max_layer_bytes(header: TraceHeader) -> int:
    """Return how large one layer's rows can rightly be once decompressed; more is refused before it is read."""
    blocks = num_blocks(header.seq_len_tokens, header.block_size)
    lists = 16 * (header.seq_len_tokens + blocks)
    return header.model.heads * (lists + packed_bytes(blocks) + 2 * MAX_SETTINGS_BYTES) + (1 << 20)


def encode_layer(training_step: int, layer: int, pattern: LayerPattern, choices: Sequence[HeadChoice]) -> pa.Table:
    """Return one layer's rows. choices: one per head."""
    if len(choices) != pattern.num_heads:
        raise InputError(f"has {len(choices)} entries for {pattern.num_heads} heads", field="choices")
    heads, blocks = pattern.heads, pattern.num_blocks
    masks = [head if isinstance(head, BlockMask) else None for head in heads]
    values = {
        "training_step": [training_step] * len(heads),
        "layer": [layer] * len(heads),
        "head": list(range(len(heads))),
        "kind": [VERTICAL_SLASH if mask is None else BLOCK_MASK for mask in masks],
        "selector": [choice.selector for choice in choices],
        "settings": [_settings_json(choice.settings) for choice in choices],
        "columns": _list_array([head.columns for head in heads]),
        "diagonals": _list_array([h.diagonals if isinstance(h, VerticalSlash) else h.columns for h in heads]),
        "block_bits": [None if mask is None else pack_bits(mask.bits) for mask in masks],
        "density": [head_density(head, blocks) for head in heads],
        "kept_mass_probe": [choice.kept_mass_probe for choice in choices],
        "kept_mass_sampled": [choice.kept_mass_sampled for choice in choices],
    }
    return pa.table(values, schema=SCHEMA)


def _list_array(lists: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(values.size for values in lists)], dtype=np.int32)
    flat = np.concatenate(lists).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(flat), type=SCHEMA.field("columns").type)


def _settings_json(settings: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"must be plain JSON values ({error})", field="settings") from error
    if len(text.encode()) > MAX_SETTINGS_BYTES:
        raise InputError(f"has {len(text.encode())} bytes of JSON, at most {MAX_SETTINGS_BYTES} fit", field="settings")
    return text


def decode_layer(
    table: pa.Table, header: TraceHeader, *, training_step: int, layer: int, source: Path
) -> tuple[HeadRow, ...]:
    """Return one layer's rows in head order; InputError names file, layer, head, field and value."""
    if table.num_rows != header.model.heads:
        raise InputError(
            f"has {table.num_rows} rows for {header.model.heads} heads", source=source, field=f"layer {layer}"
        )
    decoder = _LayerDecoder(table, header, training_step, layer, source)
    return tuple(decoder.row(head) for head in range(table.num_rows))


class _LayerDecoder:
    def __init__(self, table: pa.Table, header: TraceHeader, training_step: int, layer: int, source: Path) -> None:
        self.header, self.training_step, self.layer, self.source = header, training_step, layer, source
        self.blocks = num_blocks(header.seq_len_tokens, header.block_size)
        lists = ("columns", "diagonals")
        self.plain = table.drop_columns(list(lists)).to_pylist()
        self.lists = {name: _split_lists(table.column(name).combine_chunks()) for name in lists}

    def row(self, head: int) -> HeadRow:
        values = self.plain[head]
        self._check_place(head, values)
        pattern = self._pattern(head, values)
        self._check_density(head, values["density"], head_density(pattern, self.blocks))
        return HeadRow(
            training_step=self.training_step,
            layer=self.layer,
            head=head,
            pattern=pattern,
            choice=self._choice(head, values),
            density=values["density"],
        )

    def _fail(self, head: int, name: str, problem: str) -> InputError:
        return InputError(problem, source=self.source, field=f"layer {self.layer}, head {head}, {name}")

    def _check_place(self, head: int, values: dict[str, Any]) -> None:
        for name, expected in (("training_step", self.training_step), ("layer", self.layer), ("head", head)):
            if values[name] != expected:
                raise self._fail(head, name, f"is {values[name]} where {expected} is expected (missing or repeated?)")

    def _pattern(self, head: int, values: dict[str, Any]) -> HeadPattern:
        columns, diagonals = self.lists["columns"][head], self.lists["diagonals"][head]
        if values["kind"] == BLOCK_MASK:
            return self._block_mask(head, values["block_bits"], columns, diagonals)
        if values["kind"] != VERTICAL_SLASH:
            raise self._fail(head, "kind", f"is {values['kind']!r}, not {VERTICAL_SLASH!r} or {BLOCK_MASK!r}")
        if values["block_bits"] is not None:
            raise self._fail(head, "block_bits", "must be empty for a vertical-slash pattern")
        self._check_list(head, "columns", columns, self.header.seq_len_tokens)
        self._check_list(head, "diagonals", diagonals, self.blocks)
        return VerticalSlash(columns=columns, diagonals=diagonals)

    def _block_mask(
        self, head: int, data: bytes | None, columns: NDArray[np.int32], diagonals: NDArray[np.int32]
    ) -> BlockMask:
        if data is None:
            raise self._fail(head, "block_bits", "is missing for a block mask")
        for name, values in (("columns", columns), ("diagonals", diagonals)):
            if values.size:
                raise self._fail(head, name, f"must be empty for a block mask, has {values.size} entries")
        try:
            return BlockMask(bits=unpack_bits(data, self.blocks))
        except InputError as error:
            raise self._fail(head, "block_bits", str(error)) from error

    def _check_list(self, head: int, name: str, values: NDArray[np.int32], limit: int) -> None:
        if not values.size:
            return
        for value in (values.min(), values.max()):
            if not 0 <= value < limit:
                raise self._fail(head, name, f"has {value}, which is not in 0 to {limit - 1}")
        falls = np.flatnonzero(np.diff(values) <= 0)
        if falls.size:
            raise self._fail(head, name, f"must ascend, has {values[falls[0] + 1]} after {values[falls[0]]}")

    def _check_density(self, head: int, stated: float, actual: float) -> None:
        if not abs(stated - actual) <= 1e-9:
            raise self._fail(head, "density", f"is {stated}, the pattern's is {actual}")

    def _choice(self, head: int, values: dict[str, Any]) -> HeadChoice:
        try:
            settings = json.loads(values["settings"])
        except (ValueError, RecursionError) as error:
            raise self._fail(head, "settings", f"is not valid JSON ({error})") from error
        if not isinstance(settings, dict):
            raise self._fail(head, "settings", "must be a JSON object")
        masses = {name: values[name] for name in ("kept_mass_probe", "kept_mass_sampled")}
        try:
            return HeadChoice(selector=values["selector"], settings=settings, **masses)
        except InputError as error:
            raise self._fail(head, "choice", str(error)) from error


def _split_lists(array: pa.ListArray) -> list[NDArray[np.int32]]:
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy()
    return [values[start:stop] for start, stop in pairwise(offsets)]


def _check_mass(value: float | None, name: str) -> None:
    if value is not None and not 0.0 <= value <= 1.0 + MASS_SLACK:
        raise InputError(f"must be from 0 to 1, not {value}", field=name)
