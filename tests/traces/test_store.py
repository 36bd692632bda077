"""Traces on disk: what is written comes back, and nothing that is wrong is believed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsering.traces.dataset import store
from sparsering.traces.dataset.manifest import ModelShape, TraceHeader
from sparsering.traces.dataset.rows import HeadChoice, encode_layer, pack_bits, unpack_bits
from sparsering.traces.dataset.store import Trace, TraceWriter
from sparsering.traces.errors import InputError
from sparsering.traces.files import canonical_json, sha256_of_bytes
from sparsering.traces.pattern import BlockMask, LayerPattern, VerticalSlash, element_mask
from sparsering.traces.stats import block_overlap, describe, load_per_block_row, step_overlap

SEQ_LEN, BLOCK, HEADS, LAYERS = 200, 16, 3, 2
BLOCKS = 13
CHOICE = HeadChoice(selector="flex", settings={"column_cap": 9, "column_mass": 0.9}, kept_mass_probe=0.5)


def header(**changes: Any) -> TraceHeader:
    values: dict[str, Any] = {
        "model": ModelShape(model_id="tiny", layers=4, heads=HEADS, kv_heads=1, head_dim=8),
        "recorded_layers": tuple(range(LAYERS)),
        "seq_len_tokens": SEQ_LEN,
        "block_size": BLOCK,
        "origin": "synthetic",
        "seed": 3,
        "versions": {"sparsering": "0"},
    }
    return TraceHeader(**{**values, **changes})


def slash(columns: Any, diagonals: Any) -> VerticalSlash:
    return VerticalSlash(columns=np.asarray(columns, dtype=np.int32), diagonals=np.asarray(diagonals, dtype=np.int32))


def pattern(seed: int, *, documents: bool = False) -> LayerPattern:
    """Two vertical-slash heads (one of them without columns) and a block mask."""
    rng = np.random.default_rng(seed)
    heads = (
        slash(rng.choice(SEQ_LEN, 40, replace=False), rng.choice(BLOCKS, 4, replace=False)),
        slash([], [0]),
        BlockMask(bits=np.tril(rng.random((BLOCKS, BLOCKS)) < 0.4)),
    )
    ids = np.sort(rng.integers(0, 5, SEQ_LEN)).astype(np.int32) if documents else None
    return LayerPattern(seq_len_tokens=SEQ_LEN, block_size=BLOCK, heads=heads, documents=ids)


def layers(seed: int, *, documents: bool = False) -> dict[int, store.LayerRecord]:
    return {layer: (pattern(seed + (0 if documents else layer), documents=documents), [CHOICE] * HEADS)
            for layer in range(LAYERS)}  # fmt: skip


@pytest.fixture
def trace_folder(tmp_path: Path) -> Path:
    with TraceWriter(tmp_path / "trace", header()) as writer:
        writer.append(0, layers(0))
        writer.append(5, layers(10))
    return tmp_path / "trace"


def assert_same(first: LayerPattern, second: LayerPattern) -> None:
    assert (first.seq_len_tokens, first.block_size, first.num_heads) == (
        second.seq_len_tokens,
        second.block_size,
        second.num_heads,
    )
    for head, (a, b) in enumerate(zip(first.heads, second.heads, strict=True)):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a.columns, b.columns)
        np.testing.assert_array_equal(a.block_bits(first.num_blocks), b.block_bits(first.num_blocks))
        np.testing.assert_array_equal(element_mask(first, head), element_mask(second, head))


# ---------------------------------------------------------------- what is written comes back


@st.composite
def layer_patterns(draw: st.DrawFn) -> LayerPattern:
    seq_len, block_size = draw(st.integers(1, 300)), draw(st.sampled_from([1, 7, 64, 128]))
    blocks = -(-seq_len // block_size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heads: list[VerticalSlash | BlockMask] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            heads.append(BlockMask(bits=np.tril(rng.random((blocks, blocks)) < draw(st.floats(0, 1)))))
            continue
        heads.append(
            slash(
                rng.choice(seq_len, draw(st.integers(0, seq_len)), replace=False),
                rng.choice(blocks, draw(st.integers(0, blocks)), replace=False),
            )
        )
    documents = np.sort(rng.integers(0, 4, seq_len)).astype(np.int32) if draw(st.booleans()) else None
    return LayerPattern(seq_len_tokens=seq_len, block_size=block_size, heads=tuple(heads), documents=documents)


@given(written=layer_patterns(), masses=st.tuples(st.none() | st.floats(0, 1), st.none() | st.floats(0, 1)))
@settings(max_examples=30)
def test_any_layer_comes_back(tmp_path_factory: pytest.TempPathFactory, written: LayerPattern, masses) -> None:
    choice = HeadChoice(
        selector="any", settings={"a": [1, "b"], "c": None}, kept_mass_probe=masses[0], kept_mass_sampled=masses[1]
    )
    shape = ModelShape(model_id="m", layers=8, heads=written.num_heads, kv_heads=1, head_dim=8)
    head = header(
        model=shape, recorded_layers=(6,), seq_len_tokens=written.seq_len_tokens, block_size=written.block_size
    )
    folder = tmp_path_factory.mktemp("trace")
    with TraceWriter(folder, head) as writer:
        writer.append(11, {6: (written, [choice] * written.num_heads)})
    trace = Trace.open(folder)
    trace.verify()
    assert trace.header == head
    assert_same(trace.layer_pattern(11, 6), written)
    for number, row in enumerate(trace.heads(11)):
        assert (row.training_step, row.layer, row.head, row.choice) == (11, 6, number, choice)
        counted = written.heads[number].count_active_blocks(written.num_blocks)
        assert row.density == pytest.approx(counted / (written.num_blocks * (written.num_blocks + 1) / 2))


def test_steps_layers_and_documents(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, header()) as writer:
        writer.append(2, layers(1))
        writer.append(7, layers(2, documents=True))
        assert (writer.steps, writer.next_step) == ((2, 7), 8)
    trace = Trace.open(tmp_path)
    assert (trace.steps, trace.layers, trace.unlisted_parts) == ((2, 7), (0, 1), ())
    assert trace.layer_pattern(2, 1).documents is None
    for layer, (written, _) in layers(2, documents=True).items():
        assert_same(trace.layer_pattern(7, layer), written)


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 15, 16, 33])
def test_packed_bits(blocks: int) -> None:
    bits = np.tril(np.random.default_rng(blocks).random((blocks, blocks)) < 0.5)
    np.testing.assert_array_equal(unpack_bits(pack_bits(bits), blocks), bits)


def test_the_same_trace_has_the_same_digest(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        with TraceWriter(tmp_path / name, header()) as writer:
            writer.append(0, layers(0))
        digests.add(Trace.open(tmp_path / name).digest())
    with TraceWriter(tmp_path / "b", header()) as writer:
        writer.append(1, layers(0))
    assert len(digests) == 1
    assert Trace.open(tmp_path / "b").digest() not in digests


def test_a_long_step_is_small(tmp_path: Path) -> None:
    """512K tokens, 16 of 576 heads with 4,096 columns and 200 diagonals each: a thirty-sixth of 3.2 MB."""
    rng, seq_len = np.random.default_rng(0), 524288
    heads = tuple(
        slash(rng.choice(seq_len, 4096, replace=False), rng.choice(4096, 200, replace=False)) for _ in range(16)
    )
    layer = LayerPattern(seq_len_tokens=seq_len, block_size=128, heads=heads)
    shape = ModelShape(model_id="m", layers=1, heads=16, kv_heads=2, head_dim=128)
    head = header(model=shape, recorded_layers=(0,), seq_len_tokens=seq_len, block_size=128)
    with TraceWriter(tmp_path, head) as writer:
        writer.append(0, {0: (layer, [CHOICE] * 16)})
    assert Trace.open(tmp_path).manifest.parts[0].bytes < 3.2e6 / 36


# ---------------------------------------------------------------- writing


def test_a_trace_is_continued_by_the_same_header_only(trace_folder: Path) -> None:
    with TraceWriter(trace_folder, header()) as writer:
        assert writer.next_step == 6
        writer.append(writer.next_step, layers(4))
    assert Trace.open(trace_folder).steps == (0, 5, 6)
    changes = {
        "seq_len_tokens": 201,
        "block_size": 8,
        "recorded_layers": (0, 2),
        "origin": "real",
        "model": ModelShape(model_id="tiny", layers=4, heads=6, kv_heads=1, head_dim=8),
    }
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"manifest.json: {name}: "):
            TraceWriter(trace_folder, header(**{name: value}))


def test_one_writer_at_a_time(trace_folder: Path) -> None:
    with TraceWriter(trace_folder, header()), pytest.raises(InputError, match="being written by another process"):
        TraceWriter(trace_folder, header())
    TraceWriter(trace_folder, header()).close()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        TraceWriter(tmp_path, header())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_does_not_fit_is_not_written(trace_folder: Path) -> None:
    before = sorted(path.name for path in trace_folder.iterdir())
    wrong_length = LayerPattern(seq_len_tokens=SEQ_LEN - 1, block_size=BLOCK, heads=pattern(0).heads[:2] * 2)
    with TraceWriter(trace_folder, header()) as writer:
        for message, step, content in (
            ("5 does not follow 5", 5, layers(0)),
            ("layer 1 is missing", 6, {0: layers(0)[0]}),
            ("layer 1 was appended where 0 is expected", 6, {1: layers(0)[1]}),
            ("layer 2 was appended where nothing", 6, layers(0) | {2: layers(0)[1]}),
            ("layer 0, heads: the pattern has 4, the trace 3", 6, {0: (wrong_length, [CHOICE] * 4)}),
            ("2 entries for 3 heads", 6, {0: (pattern(0), [CHOICE] * 2)}),
            ("share their documents", 6, {0: layers(0)[0], 1: (pattern(1, documents=True), [CHOICE] * HEADS)}),
        ):
            with pytest.raises(InputError, match=message):
                writer.append(step, content)
        with pytest.raises(ZeroDivisionError), writer.step(6) as step:
            step.append(0, *layers(0)[0])
            raise ZeroDivisionError
    assert sorted(path.name for path in trace_folder.iterdir()) == before
    assert Trace.open(trace_folder).steps == (0, 5)


def test_a_crash_between_part_and_manifest(trace_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with TraceWriter(trace_folder, header()) as writer, monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.append(6, layers(6))
    trace = Trace.open(trace_folder)
    trace.verify()
    assert (trace.steps, trace.unlisted_parts) == ((0, 5), ("part-00000006.parquet",))
    with TraceWriter(trace_folder, header()) as writer:
        writer.append(6, layers(7))
    trace = Trace.open(trace_folder)
    assert (trace.steps, trace.unlisted_parts) == ((0, 5, 6), ())
    assert_same(trace.layer_pattern(6, 0), pattern(7))


ENDLESS_WRITER = """
import sys
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
settings = SyntheticSettings(seq_len_tokens=16384, heads=16)
write_synthetic_trace(sys.argv[1], "vertical-slash", settings, layers=4, steps=100_000)
"""


@pytest.mark.parametrize("delay_seconds", [0.0, 0.05])
def test_a_killed_writer_leaves_a_readable_trace(tmp_path: Path, delay_seconds: float) -> None:
    folder = tmp_path / "trace"
    writer = subprocess.Popen([sys.executable, "-c", ENDLESS_WRITER, str(folder)])
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("part-*.parquet"))) < 2 and time.monotonic() < deadline and writer.poll() is None:
            time.sleep(0.01)
        time.sleep(delay_seconds)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    trace = Trace.open(folder)
    trace.verify()
    assert trace.steps and trace.steps == tuple(range(len(trace.steps)))
    with TraceWriter(folder, trace.header) as again:  # the lock went with the process
        assert again.next_step == len(trace.steps)
    assert not list(folder.glob(".*.partial"))


# ---------------------------------------------------------------- corruption


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
    assert trace.layer_pattern(0, 0).num_heads == HEADS
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
    "schema_version: is 2, newer": lambda raw: raw.update(schema_version=2),
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
        [part.update(rows=HEADS) for part in raw["parts"]],
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
    tables = [encode_layer(0, layer, *record) for layer, record in layers(0).items()]
    rows = tables[0].to_pylist()
    change(rows)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, store.SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=store.SCHEMA), row_group_size=HEADS + 1)
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
    "layer 0, head 2, columns: must be empty": lambda rows: rows[2].update(columns=[1]),
    "layer 0, head 1, density: is 0.5": lambda rows: rows[1].update(density=0.5),
    "layer 0, head 1, density: is nan": lambda rows: rows[1].update(density=float("nan")),
    "kept_mass_probe: must be from 0 to 1, not 1.5": lambda rows: rows[0].update(kept_mass_probe=1.5),
    "kept_mass_sampled: must be from 0 to 1, not nan": lambda rows: rows[0].update(kept_mass_sampled=float("nan")),
    "settings: is not valid JSON": lambda rows: rows[0].update(settings="{"),
    "settings: must be a JSON object": lambda rows: rows[0].update(settings="3"),
    "selector: must not be empty": lambda rows: rows[0].update(selector=""),
    "decompresses to": lambda rows: rows[0].update(settings='"' + "a" * 3_000_000 + '"'),
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
    table = pa.concat_tables([encode_layer(0, layer, *record) for layer, record in layers(0).items()])
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


# ---------------------------------------------------------------- statistics and the command


def test_statistics_by_hand(tmp_path: Path) -> None:
    def heads(columns: list[int], diagonals: list[int], pairs: list[tuple[int, int]]) -> tuple:
        bits = np.zeros((4, 4), dtype=bool)
        bits[tuple(np.array(pairs).T)] = True
        return slash(columns, diagonals), BlockMask(bits=bits)

    first, second = heads([1, 2, 3], [0, 2], [(0, 0), (3, 1)]), heads([2, 3, 4, 5], [0, 1], [(3, 1), (3, 2)])
    shape = ModelShape(model_id="m", layers=1, heads=2, kv_heads=2, head_dim=8)
    head = header(model=shape, recorded_layers=(0,), seq_len_tokens=64)
    records = [LayerPattern(seq_len_tokens=64, block_size=16, heads=both) for both in (first, second)]
    with TraceWriter(tmp_path, head) as writer:
        for step, (record, mass) in enumerate(zip(records, (0.5, 0.75), strict=True)):
            writer.append(step, {0: (record, [HeadChoice(selector="s", kept_mass_sampled=mass)] * 2)})
    trace = Trace.open(tmp_path)

    assert load_per_block_row(records[0]).tolist() == [1 + 1, 1, 2, 2 + 1]
    assert block_overlap(first[0], second[0], 4) == pytest.approx(4 / 9)  # diagonals of 4, 3 and 2 pairs
    assert block_overlap(first[1], second[1], 4) == pytest.approx(1 / 3)
    overlap = step_overlap(trace, 0, 1)
    assert overlap.columns == pytest.approx((2 / 5 + 1) / 2)
    assert overlap.blocks == pytest.approx((4 / 9 + 1 / 3) / 2)
    (summary,) = describe(trace)["layers"]
    assert summary["density_mean"] == pytest.approx((6 + 2 + 7 + 2) / 4 / 10)
    assert (summary["columns_max"], summary["columns_mean"]) == (4, 7 / 4)
    assert summary["kept_mass_sampled_mean"] == pytest.approx(0.625)
    assert summary["kept_mass_probe_mean"] is None


def run_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsering.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_inspect_exits_with_2_and_one_line_for_a_corrupt_trace(trace_folder: Path) -> None:
    good = run_cli("inspect", trace_folder, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["digest"] == Trace.open(trace_folder).digest()
    part = trace_folder / "part-00000005.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    part.write_bytes(data)
    bad = run_cli("inspect", trace_folder)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith(f"sparsering: {part}: sha256: ") and bad.stderr.count("\n") == 1
