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

from ..blocks.mask import NOTHING, BlockMask
from ..blocks.triangle import pack_bits, packed_bytes
from ..errors import CONTROL, InputError, shown
from ..pattern import MOST_EDGES, HeadPattern, LayerPattern, VerticalSlash, num_blocks, window_problem
from ..strict_json import parse_json
from .manifest import TraceHeader
from .row_formats import DOCUMENT_MASSES, INT32S, LISTS, MASSES, NEWEST, RowFormat

VERTICAL_SLASH = "vertical-slash"
BLOCK_MASK = "block-mask"
MAX_SETTINGS_BYTES = 4096
MASS_SLACK = 1e-6
# Beyond these a file of a few bytes could ask for gigabytes: 32 block masks over a million tokens in blocks of 128 fit.
MAX_LAYER_BYTES = 256 << 20
MAX_MASK_BLOCKS = 1 << 14
# Of rows that were written before there were windows, and anchors.
NOT_SAID = {"window_tokens": 0, "cut_diagonals": NOTHING, "anchor_tokens": 0}


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """How one head's pattern was chosen and how much attention it keeps.

    selector:          name of the selector or generator
    settings:          its settings, plain JSON values
    kept_mass_probe:   mean share of attention kept for the queries that chose, 0 to 1; None when not measured;
                       of packed documents: for the last queries of all of them
    kept_mass_sampled: the same for seeded rows over the whole sequence
    kept_mass_documents: for the last queries of each packed document, in their order; None without documents
    """

    selector: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kept_mass_probe: float | None = None
    kept_mass_sampled: float | None = None
    kept_mass_documents: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.selector:
            raise InputError("must not be empty", field="selector")
        given = {name: (getattr(self, name),) for name in MASSES} | {DOCUMENT_MASSES: self.kept_mass_documents or ()}
        for name, values in given.items():
            for value in values:
                if value is not None and not 0.0 <= value <= 1.0 + MASS_SLACK:
                    raise InputError(f"must be from 0 to 1, not {value}", field=name)


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """One row of a trace, checked. anchor_tokens: of the layer, the same in all its rows."""

    training_step: int
    layer: int
    head: int
    pattern: HeadPattern
    choice: HeadChoice
    density: float
    anchor_tokens: int = 0


def head_density(pattern: HeadPattern, blocks: int) -> float:
    """Return one head's active causal blocks over N(N+1)/2; columns excluded."""
    return pattern.count_active_blocks(blocks) / (blocks * (blocks + 1) / 2)


def max_layer_bytes(header: TraceHeader) -> int:
    """Return how large one layer's rows can rightly be once decompressed; more is refused before it is read."""
    blocks = num_blocks(header.seq_len_tokens, header.block_size)
    lists = 16 * (2 * header.seq_len_tokens + blocks + MOST_EDGES)  # columns, and a mass of each document
    possible = header.model.heads * (lists + packed_bytes(blocks) + 2 * MAX_SETTINGS_BYTES) + (1 << 20)
    return min(possible, MAX_LAYER_BYTES)


def encode_layer(
    training_step: int,
    layer: int,
    pattern: LayerPattern,
    choices: Sequence[HeadChoice],
    *,
    row_format: RowFormat = NEWEST,
) -> pa.Table:
    """Return one layer's rows. choices: one per head. InputError for windows and columns that the format has not.

    Masses of documents are left out where the format has none.
    """
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
        "diagonals": _list_array([h.diagonals if isinstance(h, VerticalSlash) else NOTHING for h in heads]),
        "block_bits": [None if mask is None else pack_bits(mask.bits) for mask in masks],
        "density": [head_density(head, blocks) for head in heads],
        **{name: [getattr(choice, name) for choice in choices] for name in MASSES},
    }
    if row_format.windows:
        values |= {"window_tokens": [head.window_tokens for head in heads]}
        values |= {"cut_diagonals": _list_array([head.cut for head in heads])}
    if row_format.apart:
        values |= {DOCUMENT_MASSES: [choice.kept_mass_documents for choice in choices]}
        values |= {"anchor_tokens": [pattern.anchor_tokens] * len(heads)}
    _require_known(layer, pattern, row_format)
    return pa.table(values, schema=row_format.schema)


def _require_known(layer: int, pattern: LayerPattern, row_format: RowFormat) -> None:
    if pattern.anchor_tokens and not row_format.apart:
        problem = f"are {pattern.anchor_tokens}, which a trace before schema version 3 has not: start another trace"
        raise InputError(problem, field=f"layer {layer}, anchor_tokens")
    for number, head in enumerate(pattern.heads):
        place = f"layer {layer}, head {number}"
        if head.window_tokens and not row_format.windows:
            problem = f"is {head.window_tokens}; this trace is of schema version 1, without windows"
            raise InputError(f"{problem}: start another trace", field=f"{place}, window_tokens")
        if head.columns.size and isinstance(head, BlockMask) and not row_format.apart:
            problem = f"are {head.columns.size} beside listed blocks, which a trace before schema version 3 has not"
            raise InputError(f"{problem}: start another trace", field=f"{place}, columns")


def _list_array(lists: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(values.size for values in lists)], dtype=np.int32)
    flat = np.concatenate(lists).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(flat), type=INT32S)


def _settings_json(settings: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"must be plain JSON values ({error})", field="settings") from error
    if len(text.encode()) > MAX_SETTINGS_BYTES:
        raise InputError(f"has {len(text.encode())} bytes of JSON, at most {MAX_SETTINGS_BYTES} fit", field="settings")
    return text


def decode_layer(
    table: pa.Table, header: TraceHeader, *, training_step: int, layer: int, source: Path, documents: int | None = None
) -> tuple[HeadRow, ...]:
    """Return one layer's rows in head order; InputError names file, layer, head, field and value.

    documents: how many the step packs; None: it is one.
    """
    if table.num_rows != header.model.heads:
        raise InputError(
            f"has {table.num_rows} rows for {header.model.heads} heads", source=source, field=f"layer {layer}"
        )
    names = [name for name in LISTS if name in table.column_names]  # those of the version that the trace is of
    lists = {name: _split_lists(table.column(name).combine_chunks()) for name in names}
    apart = DOCUMENT_MASSES in table.column_names
    masses = _split_masses(table.column(DOCUMENT_MASSES).combine_chunks()) if apart else [None] * table.num_rows
    rows, plain = [], table.drop_columns([*names, *([DOCUMENT_MASSES] if apart else [])])
    for head, values in enumerate(plain.to_pylist()):
        values = NOT_SAID | values | {name: lists[name][head] for name in names}
        values |= {"apart": apart, DOCUMENT_MASSES: masses[head], "documents": documents}
        place = {"training_step": training_step, "layer": layer, "head": head}
        try:
            rows.append(_head_row(values, header, place))
        except InputError as error:
            raise InputError(f"layer {layer}, head {head}, {error}", source=source) from error
    return tuple(rows)


def _head_row(values: Mapping[str, Any], header: TraceHeader, place: Mapping[str, int]) -> HeadRow:
    for name, expected in place.items():
        if values[name] != expected:
            raise InputError(f"is {values[name]} where {expected} is expected (missing or repeated?)", field=name)
    blocks = num_blocks(header.seq_len_tokens, header.block_size)
    pattern = _pattern(values, header, blocks)
    stated, actual = values["density"], head_density(pattern, blocks)
    if not abs(stated - actual) <= 1e-9:
        raise InputError(f"is {stated}, the pattern's is {actual}", field="density")
    anchors = values["anchor_tokens"]
    return HeadRow(**place, pattern=pattern, choice=_choice(values), density=stated, anchor_tokens=anchors)


def _pattern(values: Mapping[str, Any], header: TraceHeader, blocks: int) -> HeadPattern:
    kind, bits = values["kind"], values["block_bits"]
    if kind == BLOCK_MASK:
        return _block_mask(values, blocks, header.seq_len_tokens)
    if kind != VERTICAL_SLASH:
        raise InputError(f"is {shown(kind)}, not {VERTICAL_SLASH!r} or {BLOCK_MASK!r}", field="kind")
    if bits is not None:
        raise InputError("must be empty for a vertical-slash pattern", field="block_bits")
    _check_list("columns", values["columns"], header.seq_len_tokens)
    _check_list("diagonals", values["diagonals"], blocks)
    _check_list("cut_diagonals", values["cut_diagonals"], blocks)
    _check_window(values, header.block_size, blocks)
    return VerticalSlash(
        columns=values["columns"],
        diagonals=values["diagonals"],
        window_tokens=values["window_tokens"],
        cut=values["cut_diagonals"],
    )


def _block_mask(values: Mapping[str, Any], blocks: int, seq_len_tokens: int) -> BlockMask:
    if values["block_bits"] is None:
        raise InputError("is missing for a block mask", field="block_bits")
    for name in LISTS:
        if values[name].size and not (name == "columns" and values["apart"]):
            raise InputError(f"must be empty for a block mask, has {values[name].size} entries", field=name)
    _check_list("columns", values["columns"], seq_len_tokens)
    if values["window_tokens"]:
        raise InputError(f"must be 0 for a block mask, is {values['window_tokens']}", field="window_tokens")
    if blocks > MAX_MASK_BLOCKS:
        raise InputError(f"is over {blocks} blocks; at most {MAX_MASK_BLOCKS} are read", field="block_bits")
    return BlockMask.of_triangle(values["block_bits"], blocks, values["columns"])


def _check_window(values: Mapping[str, Any], block_size: int, blocks: int) -> None:
    window_tokens = values["window_tokens"]
    if window_tokens < 0:
        raise InputError(f"has {window_tokens}, which is negative", field="window_tokens")
    problem = window_problem(
        window_tokens, values["diagonals"], values["cut_diagonals"], block_size=block_size, blocks=blocks
    )
    if problem is not None:
        raise InputError(problem.told, field={"cut": "cut_diagonals"}.get(problem.field, problem.field))


def _check_list(name: str, values: NDArray[np.int32], limit: int) -> None:
    if not values.size:
        return
    for value in (values.min(), values.max()):
        if not 0 <= value < limit:
            raise InputError(f"has {value}, which is not in 0 to {limit - 1}", field=name)
    falls = np.flatnonzero(np.diff(values) <= 0)
    if falls.size:
        raise InputError(f"must ascend, has {values[falls[0] + 1]} after {values[falls[0]]}", field=name)


def _choice(values: Mapping[str, Any]) -> HeadChoice:
    if odd := CONTROL.search(values["selector"]):
        raise InputError(f"{shown(values['selector'])} holds U+{ord(odd[0]):04X}, which is no text", field="selector")
    settings = parse_json(values["settings"].encode(), "settings", max_values=MAX_SETTINGS_BYTES)
    if not isinstance(settings, dict):
        raise InputError("must be a JSON object", field="settings")
    masses, documents = values[DOCUMENT_MASSES], values["documents"]
    if masses is not None and len(masses) != documents:
        raise InputError(f"has {len(masses)}, the step packs {documents or 'no'} documents", field=DOCUMENT_MASSES)
    return HeadChoice(
        selector=values["selector"], settings=settings, **{name: values[name] for name in MASSES},
        kept_mass_documents=None if masses is None else tuple(masses.tolist()),
    )  # fmt: skip


def _split_masses(array: pa.ListArray) -> list[NDArray[np.float64] | None]:
    values, known = array.values.to_numpy(), array.is_valid().to_pylist()
    bounds = pairwise(array.offsets.to_numpy())
    return [values[start:stop] if is_known else None for (start, stop), is_known in zip(bounds, known, strict=True)]


def _split_lists(array: pa.ListArray) -> list[NDArray[np.int32]]:
    values = array.values.to_numpy()
    return [values[start:stop] for start, stop in pairwise(array.offsets.to_numpy())]
