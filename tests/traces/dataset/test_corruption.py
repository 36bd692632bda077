"""Traces on disk: nothing that is wrong is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from sparsering.traces.dataset.row_formats import SCHEMA
from sparsering.traces.dataset.rows import encode_layer
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from sparsering.traces.files import canonical_json, sha256_of_bytes


def read_everything(folder: Path) -> Trace:
    trace = Trace.open(folder)
    trace.verify()
    return trace


def test_every_flipped_bit_of_a_part_is_seen(trace_folder: Path) -> None:
    part = trace_folder / "part-00000005.parquet"
    good = part.read_bytes()
    for place in range(0, len(good), 5):
        data = bytearray(good)
        data[place] ^= 1 << (place % 8)
        part.write_bytes(data)
        with pytest.raises(InputError, match=r"part-00000005.parquet: sha256: "):
            read_everything(trace_folder)


def test_every_flipped_bit_of_the_manifest_is_seen(trace_folder: Path) -> None:
    path = trace_folder / "manifest.json"
    good, trace = path.read_bytes(), Trace.open(trace_folder)
    seen = 0
    for place in range(0, len(good), 3):
        data = bytearray(good)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        try:
            assert read_everything(trace_folder).manifest == trace.manifest  # only white space may change unseen
            assert good[place : place + 1].isspace()
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            seen += 1
    assert seen > len(good) / 6


@pytest.mark.parametrize("name", ["manifest.json", "part-00000000.parquet"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(trace_folder: Path, name: str, share: float) -> None:
    path = trace_folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=name):
        read_everything(trace_folder)


def test_missing_files(trace_folder: Path) -> None:
    (trace_folder / "part-00000000.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00000000.parquet: is listed"):
        Trace.open(trace_folder)
    (trace_folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds no manifest.json"):
        Trace.open(trace_folder)


def test_a_part_is_compared_again_when_it_is_read(trace_folder: Path) -> None:
    trace = Trace.open(trace_folder)
    os.truncate(trace_folder / "part-00000005.parquet", 100)
    assert trace.layer_pattern(0, 0).num_heads == tiny.TRACE_HEADS
    with pytest.raises(InputError, match="is 100 bytes"):
        trace.layer_pattern(5, 0)


def rewrite_manifest(folder: Path, change) -> None:
    """Apply `change` to the manifest's JSON and give it a digest that fits."""
    raw = json.loads((folder / "manifest.json").read_bytes())
    change(raw)
    raw.pop("digest")
    raw["digest"] = sha256_of_bytes(canonical_json(raw))
    (folder / "manifest.json").write_text(json.dumps(raw))


MANIFEST_CHANGES = {
    "schema_version: is 4; this version reads up to 3": lambda raw: raw.update(schema_version=4),
    "schema_version: must be a whole": lambda raw: raw.update(schema_version="1"),
    "kind": lambda raw: raw.update(kind="plan"),
    "surprise": lambda raw: raw.update(surprise=1),
    "header.model.heads": lambda raw: raw["header"]["model"].update(heads=0),
    "no multiple of kv_heads": lambda raw: raw["header"]["model"].update(kv_heads=2),
    "header.seq_len_tokens": lambda raw: raw["header"].update(seq_len_tokens=-1),
    "header.block_size": lambda raw: raw["header"].update(block_size="16"),
    "header.origin": lambda raw: raw["header"].update(origin="dreamt"),
    "recorded_layers has 9": lambda raw: raw["header"].update(recorded_layers=[0, 9]),
    "recorded_layers must ascend": lambda raw: raw["header"].update(recorded_layers=[1, 0]),
    "header.model.windows: has 3 entries for 4 layers": lambda raw: raw["header"]["model"].update(windows=[1, 2, 3]),
    "header.model.windows.1": lambda raw: raw["header"]["model"].update(windows=[0, -1, 0, 0]),
    "header.model.chunks.0": lambda raw: raw["header"]["model"].update(chunks=["1", 0, 0, 0]),
    "header.model.softcap": lambda raw: raw["header"]["model"].update(softcap=0),
    "schema_version is 1, which has no header.model.softcap": lambda raw: (
        raw.update(schema_version=1),
        raw["header"]["model"].update(softcap=2.5),
    ),
    "schema_version is 1, which has no header.model.chunks": lambda raw: (
        raw.update(schema_version=1),
        raw["header"]["model"].update(chunks=[0, 8, 0, 0]),
    ),
    "schema: has other fields or types than a trace of schema version 1 has": lambda raw: raw.update(schema_version=1),
    "parts.0.file": lambda raw: raw["parts"][0].update(file="../part-00000000.parquet"),
    "parts.1.file": lambda raw: raw["parts"][1].update(file="/tmp/part-00000005.parquet"),
    "parts.0.sha256": lambda raw: raw["parts"][0].update(sha256="0" * 63),
    "parts.0.bytes": lambda raw: raw["parts"][0].update(bytes=1 << 50),
    "name a file twice": lambda raw: raw["parts"][1].update(file="part-00000000.parquet"),
    "ascend in training_step": lambda raw: raw["parts"].reverse(),
    "has 7 rows": lambda raw: raw["parts"][0].update(rows=7),
    "must ascend from 0": lambda raw: raw["parts"][0].update(document_starts_tokens=[0, 5, 5]),
    "has 200 in 200 tokens": lambda raw: raw["parts"][0].update(document_starts_tokens=[0, 200]),
    "rows: has 6, 3 are expected": lambda raw: (
        raw["header"].update(recorded_layers=[0]),
        [part.update(rows=tiny.TRACE_HEADS) for part in raw["parts"]],
    ),
}


@pytest.mark.parametrize("message", list(MANIFEST_CHANGES))
def test_a_manifest_that_cannot_be(trace_folder: Path, message: str) -> None:
    rewrite_manifest(trace_folder, MANIFEST_CHANGES[message])
    with pytest.raises(InputError) as caught:
        read_everything(trace_folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def replace_part(folder: Path, data: bytes) -> None:
    """Put `data` in the place of the first part, with a manifest that vouches for it."""
    (folder / "part-00000000.parquet").write_bytes(data)
    rewrite_manifest(folder, lambda raw: raw["parts"][0].update(sha256=sha256_of_bytes(data), bytes=len(data)))


def altered_part(change) -> bytes:
    """Return the first part with `change` applied to the rows (Python values) of its first layer."""
    tables = [encode_layer(0, layer, *record) for layer, record in tiny.layer_records(0).items()]
    rows = tables[0].to_pylist()
    change(rows)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=tiny.TRACE_HEADS + 1)
        writer.write_table(tables[1])
    return sink.getvalue().to_pybytes()


def swap(rows: list[dict[str, Any]], first: int, second: int) -> None:
    rows[first], rows[second] = rows[second], rows[first]


ROW_CHANGES = {
    "layer 0, head 0, columns: has 200, which is not in 0 to 199": lambda rows: rows[0]["columns"].append(200),
    "layer 0, head 0, columns: has -1": lambda rows: rows[0]["columns"].insert(0, -1),
    "layer 0, head 0, columns: must ascend": lambda rows: rows[0]["columns"].reverse(),
    "layer 0, head 0, diagonals: has 13": lambda rows: rows[0]["diagonals"].append(13),
    "layer 0, head 1, diagonals: must ascend, has 0 after 0": lambda rows: rows[1]["diagonals"].append(0),
    "layer 0, head 0, window_tokens: has -1, which is negative": lambda rows: rows[0].update(window_tokens=-1),
    "layer 0, head 0, window_tokens: has 209, which 13 blocks of 16": lambda rows: rows[0].update(window_tokens=209),
    "layer 0, head 0, cut_diagonals: has 13, which is not in 0 to 12": lambda rows: rows[0].update(cut_diagonals=[13]),
    "layer 0, head 0, cut_diagonals: has -1": lambda rows: rows[0].update(cut_diagonals=[-1]),
    "layer 0, head 1, cut_diagonals: must ascend, has 0 after 0": lambda rows: rows[1].update(cut_diagonals=[0, 0]),
    "layer 0, head 1, cut_diagonals: has 0, but no window": lambda rows: rows[1].update(cut_diagonals=[0]),
    "layer 0, head 1, cut_diagonals: has 1, which is none of its diagonals": lambda rows: rows[1].update(
        window_tokens=10, cut_diagonals=[1]
    ),
    "layer 0, head 1, cut_diagonals: has 0, which the edge of a window of 20": lambda rows: rows[1].update(
        diagonals=[0, 1, 2], window_tokens=20, cut_diagonals=[0]
    ),
    "layer 0, head 1, diagonals: lacks 1, which a window of 20 tokens reaches": lambda rows: rows[1].update(
        window_tokens=20
    ),
    "layer 0, head 2, window_tokens: must be 0 for a block mask, is 3": lambda rows: rows[2].update(window_tokens=3),
    "layer 0, head 2, cut_diagonals: must be empty": lambda rows: rows[2].update(cut_diagonals=[1]),
    "layer 0, head 0, head: is 1 where 0": lambda rows: swap(rows, 0, 1),
    "layer 0, head 1, head: is 0 where 1": lambda rows: rows[1].update(head=0),
    "layer 0, head 2, layer: is 1 where 0": lambda rows: rows[2].update(layer=1),
    "training_step: is 5 where 0": lambda rows: rows[0].update(training_step=5),
    "rows: has 5, 6 are expected": lambda rows: rows.pop(),
    "rows: has 7, 6 are expected": lambda rows: rows.append(rows[2]),
    "layer 0, head 0, kind: is 'dense'": lambda rows: rows[0].update(kind="dense"),
    "layer 0, head 0, block_bits: must be empty": lambda rows: rows[0].update(block_bits=b"\x80"),
    "layer 0, head 2, block_bits: is missing": lambda rows: rows[2].update(block_bits=None),
    "layer 0, head 2, block_bits: is 11 bytes, 12": lambda rows: rows[2].update(block_bits=b"\x80" * 11),
    "layer 0, head 2, block_bits: has bits beyond": lambda rows: rows[2].update(block_bits=b"\xff" * 12),
    "layer 0, head 2, diagonals: must be empty": lambda rows: rows[2].update(diagonals=[1]),
    "layer 0, head 2, columns: has 200, which is not in 0 to 199": lambda rows: rows[2].update(columns=[200]),
    "layer 0, head 1, kept_mass_documents: has 2, the step packs no": lambda rows: rows[1].update(
        kept_mass_documents=[0.5, 1.0]
    ),
    "layer 0, head 1, density: is 0.5": lambda rows: rows[1].update(density=0.5),
    "layer 0, head 1, density: is nan": lambda rows: rows[1].update(density=float("nan")),
    "kept_mass_probe: must be from 0 to 1, not 1.5": lambda rows: rows[0].update(kept_mass_probe=1.5),
    "kept_mass_sampled: must be from 0 to 1, not nan": lambda rows: rows[0].update(kept_mass_sampled=float("nan")),
    "settings: is not valid JSON": lambda rows: rows[0].update(settings="{"),
    "settings: must be a JSON object": lambda rows: rows[0].update(settings="3"),
    "selector: must not be empty": lambda rows: rows[0].update(selector=""),
    "unpacks to": lambda rows: rows[0].update(settings='"' + "a" * 3_000_000 + '"'),
}


@pytest.mark.parametrize("message", list(ROW_CHANGES))
def test_a_row_that_cannot_be(trace_folder: Path, message: str) -> None:
    replace_part(trace_folder, altered_part(lambda rows: None))
    read_everything(trace_folder)
    replace_part(trace_folder, altered_part(ROW_CHANGES[message]))
    with pytest.raises(InputError) as caught:
        read_everything(trace_folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(trace_folder / "part-00000000.parquet"))


def test_other_columns_or_types_are_refused(trace_folder: Path) -> None:
    table = pa.concat_tables([encode_layer(0, layer, *record) for layer, record in tiny.layer_records(0).items()])
    for message, other in (
        ("layers: has 1, 2 are expected", table),  # one row group for both layers
        ("schema: has other fields", table.drop_columns(["density"])),
        ("schema: has other fields", table.append_column("extra", [list(range(6))])),
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(other, sink)
        replace_part(trace_folder, sink.getvalue().to_pybytes())
        with pytest.raises(InputError, match=message):
            read_everything(trace_folder)
    replace_part(trace_folder, b"PAR1 this is no Parquet file PAR1")
    with pytest.raises(InputError, match="is not a Parquet file"):
        read_everything(trace_folder)


def test_the_parser_survives_what_a_forged_digest_vouches_for(trace_folder: Path) -> None:
    good = (trace_folder / "part-00000000.parquet").read_bytes()
    refused = 0
    for place in range(0, len(good), 23):
        data = bytearray(good)
        data[place] ^= 1 << (place % 8)
        replace_part(trace_folder, bytes(data))
        try:
            read_everything(trace_folder)  # what is left may be another valid pattern
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 50


def test_what_was_not_recorded_is_refused(trace_folder: Path) -> None:
    trace = Trace.open(trace_folder)
    with pytest.raises(InputError, match="training_step: 1 was not recorded"):
        trace.layer_pattern(1, 0)
    with pytest.raises(InputError, match="layer: 2 was not recorded"):
        trace.layer_rows(0, 2)
