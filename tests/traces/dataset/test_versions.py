"""Traces of all schema versions: what was written before there were windows reads as it was and goes on as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import tiny
from sparsering.traces.dataset.manifest import ModelShape
from sparsering.traces.dataset.row_formats import FORMATS
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import LayerRecord, TraceWriter
from sparsering.traces.errors import InputError
from sparsering.traces.files import read_json
from sparsering.traces.pattern import BlockMask, HeadPattern, LayerPattern, VerticalSlash, element_mask, windowed
from sparsering.traces.stats import kept_of_documents

MODEL = {"model_id": "tiny", "layers": 4, "heads": tiny.TRACE_HEADS, "kv_heads": 1, "head_dim": 8}


@pytest.fixture
def old(golden: Path, tmp_path: Path) -> Path:
    """A copy of a trace that version 1 wrote: columns, diagonals, documents, block masks."""
    return shutil.copytree(golden / "trace-version-1", tmp_path / "old")


def window(tokens: int, **others: Any) -> VerticalSlash:
    return windowed(tokens, block_size=tiny.TRACE_BLOCK, blocks=tiny.TRACE_BLOCKS, **others)


def with_windows(records: dict[int, LayerRecord]) -> dict[int, LayerRecord]:
    """The same with other windows in every layer's first two heads."""
    changed = {}
    for layer, (pattern, choices) in records.items():
        heads = (window(40 + layer, columns=[3, 90], diagonals=[2, 9]), window(1 + 15 * layer), pattern.heads[2])
        pattern = LayerPattern(
            seq_len_tokens=pattern.seq_len_tokens, block_size=pattern.block_size, heads=heads,
            documents=pattern.documents,
        )  # fmt: skip
        changed[layer] = (pattern, choices)
    return changed


def as_values(head: HeadPattern) -> dict[str, Any]:
    if isinstance(head, VerticalSlash):
        return {"columns": head.columns.tolist(), "diagonals": head.diagonals.tolist(), "bits": None}
    bits = ["".join("01"[int(bit)] for bit in row) for row in head.bits]
    return {"columns": [], "diagonals": None, "bits": bits}


def test_a_trace_of_version_1_reads_as_it_was(golden: Path) -> None:
    """Beside it lies what version 1 read in it."""
    was, trace = read_json(golden / "trace-version-1.json"), Trace.open(golden / "trace-version-1")
    assert trace.manifest.schema_version == 1 and trace.digest() == was["digest"]
    parts = {str(part.training_step): part.document_starts_tokens for part in trace.manifest.parts}
    assert {step: starts and list(starts) for step, starts in parts.items()} == was["document_starts_tokens"]
    rows = [row for step in trace.steps for row in trace.heads(step)]
    assert len(rows) == len(was["rows"]) == 12
    for row, expected in zip(rows, was["rows"], strict=True):
        place = {name: getattr(row, name) for name in ("training_step", "layer", "head", "density")}
        assert place | as_values(row.pattern) == expected
        assert row.pattern.window_tokens == 0 and row.pattern.cut.size == 0
    assert trace.header.model.windows is None and trace.header.model.chunks is None


def test_a_trace_of_version_1_goes_on_as_one(old: Path) -> None:
    with TraceWriter(old, tiny.trace_header()) as writer:
        writer.append(6, tiny.layer_records(3))
        with pytest.raises(
            InputError,
            match=r"layer 0, head 0, window_tokens: is 40; this trace is of schema version 1, without windows",
        ):
            writer.append(7, with_windows(tiny.layer_records(3)))
    trace = Trace.open(old)
    assert trace.steps == (0, 5, 6) and trace.manifest.schema_version == 1
    for part in trace.manifest.parts:
        assert pq.read_schema(old / part.file).equals(FORMATS[1].schema)
    tiny.assert_same_layer(trace.layer_pattern(6, 0), tiny.layer_pattern(3))
    assert set(json.loads((old / "manifest.json").read_text())["header"]["model"]) == set(MODEL)


def test_a_model_with_windows_starts_another_trace(old: Path) -> None:
    header = tiny.trace_header(model=ModelShape(**MODEL, windows=(8, 0, 0, 0)))
    with pytest.raises(InputError, match=r"manifest.json: model.windows: the trace has .*: start another trace"):
        TraceWriter(old, header)


@pytest.mark.parametrize("documents", [False, True])
def test_windows_come_back(tmp_path: Path, documents: bool) -> None:
    records = with_windows(tiny.layer_records(0, documents=documents))
    model = ModelShape(**MODEL, windows=(40, 0, 41, 0), chunks=(0, 64, 0, 0), softcap=30.5)
    with TraceWriter(tmp_path / "trace", tiny.trace_header(model=model)) as writer:
        writer.append(0, records)
    with TraceWriter(tmp_path / "trace", tiny.trace_header(model=model)) as writer:
        writer.append(1, tiny.layer_records(1))
    trace = Trace.open(tmp_path / "trace")
    trace.verify()
    assert trace.manifest.schema_version == 3
    assert (trace.header.model.windows, trace.header.model.chunks) == ((40, 0, 41, 0), (0, 64, 0, 0))
    assert trace.header.model.softcap == 30.5
    for layer, (pattern, _) in records.items():
        found = trace.layer_pattern(0, layer)
        tiny.assert_same_layer(found, pattern)
        assert [head.window_tokens for head in found.heads] == [40 + layer, 1 + 15 * layer, 0]
        tiny.assert_same_layer(trace.layer_pattern(1, layer), tiny.layer_pattern(1 + layer))
    first = trace.layer_pattern(0, 0).heads[0]
    np.testing.assert_array_equal(first.cut, [3])  # 2 was given: attended whole


def test_limits_that_are_none_are_not_written() -> None:
    shape = ModelShape(**MODEL, windows=(0,) * 4, chunks=(0, 0, 0, 5))
    assert shape.windows is None and shape == ModelShape(**MODEL, chunks=(0, 0, 0, 5))
    assert shape.model_dump(mode="json") == MODEL | {"chunks": [0, 0, 0, 5]}
    assert ModelShape(**MODEL).model_dump(mode="json") == MODEL


def test_a_trace_of_version_2_reads_and_goes_on_as_it_was(golden: Path, tmp_path: Path) -> None:
    """Windows, documents and block masks; no masses of documents, no columns beside listed blocks."""
    folder = shutil.copytree(golden / "trace-version-2", tmp_path / "old")
    records, apart = with_windows(tiny.layer_records(0, documents=True)), tiny.layer_records(0, documents=True)
    documents = int(tiny.layer_pattern(0, documents=True).documents[-1]) + 1  # pyright: ignore[reportOptionalSubscript]
    choice = replace(tiny.CHOICE, kept_mass_documents=(0.5,) * documents)
    pattern = apart[0][0]
    heads = (*pattern.heads[:2], BlockMask(bits=pattern.heads[2].block_bits(pattern.num_blocks), columns=[7]))
    with TraceWriter(folder, tiny.trace_header()) as writer:
        writer.append(6, {layer: (one, [choice] * tiny.TRACE_HEADS) for layer, (one, _) in apart.items()})
        with pytest.raises(
            InputError, match="layer 0, head 2, columns: are 1 beside listed blocks, which a trace befo"
        ):
            writer.append(7, {0: (replace(pattern, heads=heads), apart[0][1]), 1: apart[1]})
    trace = Trace.open(folder)
    assert trace.steps == (0, 6) and trace.manifest.schema_version == 2
    for layer, (wanted, choices) in records.items():
        tiny.assert_same_layer(trace.layer_pattern(0, layer), wanted)
        assert [row.choice for row in trace.layer_rows(0, layer)] == choices
    assert trace.layer_rows(6, 0)[0].choice == tiny.CHOICE


def test_what_is_chosen_for_each_document_comes_back(tmp_path: Path) -> None:
    records, changed = tiny.layer_records(0, documents=True), {}
    documents = int(tiny.layer_pattern(0, documents=True).documents[-1]) + 1  # pyright: ignore[reportOptionalSubscript]
    for layer, (pattern, _) in records.items():
        bits = pattern.heads[2].block_bits(pattern.num_blocks)
        heads = (*pattern.heads[:2], BlockMask(bits=bits, columns=[3, 60 + layer, 199]))
        masses = tuple(np.linspace(0.1 * layer, 1, documents).tolist())
        choices = [tiny.CHOICE, *[replace(tiny.CHOICE, kept_mass_documents=masses)] * 2]
        changed[layer] = replace(pattern, heads=heads), choices
    with TraceWriter(tmp_path / "trace", tiny.trace_header()) as writer:
        writer.append(0, changed)
        short = [replace(tiny.CHOICE, kept_mass_documents=(1.0,))] * tiny.TRACE_HEADS
        with pytest.raises(InputError, match=rf"head 0, kept_mass_documents: has 1, the pattern {documents} documents"):
            writer.append(1, {layer: (pattern, short) for layer, (pattern, _) in records.items()})
    trace = Trace.open(tmp_path / "trace")
    for layer, (pattern, choices) in changed.items():
        tiny.assert_same_layer(trace.layer_pattern(0, layer), pattern)
        assert [row.choice for row in trace.layer_rows(0, layer)] == choices
    found = kept_of_documents(trace)
    assert [one["document"] for one in found] == list(range(documents))
    assert sum(one["tokens"] for one in found) == tiny.TRACE_TOKENS and found[-1]["kept_mass_mean"] == 1
    assert (found[0]["kept_mass_mean"], found[0]["kept_mass_min"]) == (pytest.approx(0.05), 0)


def test_anchors_come_back_and_must_fit(tmp_path: Path) -> None:
    records = tiny.layer_records(0, documents=True)
    first, anchored = int(np.argmax(np.diff(records[0][0].documents) > 0)) + 1, {}  # pyright: ignore[reportArgumentType, reportCallIssue]
    for layer, (pattern, choices) in records.items():
        bits = pattern.heads[2].block_bits(pattern.num_blocks)
        heads = (tiny.slash([0, 1, 50], [0]), tiny.slash([0, 1], [0, 2]), BlockMask(bits=bits, columns=[0, 1]))
        anchored[layer] = replace(pattern, heads=heads, anchor_tokens=2 * layer), choices
    with TraceWriter(tmp_path / "trace", tiny.trace_header()) as writer:
        writer.append(0, anchored)
    trace = Trace.open(tmp_path / "trace")
    for layer, (pattern, _) in anchored.items():
        assert trace.layer_pattern(0, layer).anchor_tokens == 2 * layer
        tiny.assert_same_layer(trace.layer_pattern(0, layer), pattern)
    allowed = element_mask(anchored[1][0], 1)
    assert allowed[first:, :2].all() and not allowed[first:, 2:first].any()
    for tokens, told in ((first + 1, f"is {first + 1}; the first packed document has {first} tokens"),
                         (3, "is 3, which are not all columns of head 0")):  # fmt: skip
        with pytest.raises(InputError, match=f"anchor_tokens: {told}"):
            replace(anchored[0][0], anchor_tokens=tokens)
    with pytest.raises(InputError, match="anchor_tokens: is 1; the first packed document has 0 tokens"):
        replace(anchored[0][0], anchor_tokens=1, documents=None)
