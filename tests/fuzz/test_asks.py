"""Traces of a few kilobytes that ask for gigabytes: one line, before anything is unpacked."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats import vouched
from many_inputs import one_more_gibibyte
from sparsering.traces.blocks.triangle import packed_bytes
from sparsering.traces.dataset import rows
from sparsering.traces.dataset.manifest import ModelShape, TraceHeader
from sparsering.traces.dataset.pages import BrokenPage, sizes_of_chunk
from sparsering.traces.dataset.row_formats import SCHEMA
from sparsering.traces.dataset.rows import BLOCK_MASK, VERTICAL_SLASH
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.errors import InputError
from sparsering.traces.pattern import BlockMask, LayerPattern
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace

SMALL = 400_000
MASK = {"kind": BLOCK_MASK, "columns": [], "diagonals": [], "density": 0.0}
DENSE = {"kind": VERTICAL_SLASH, "columns": [], "diagonals": [0], "block_bits": None}


def trace_of(folder: Path, values: list[dict[str, Any]], *, blocks: int, **written: Any) -> Path:
    """Write a trace of one layer with these rows, whose manifest vouches for them; return its part."""
    header = TraceHeader(
        model=ModelShape(model_id="hostile", layers=1, heads=len(values), kv_heads=1, head_dim=8),
        recorded_layers=(0,), seq_len_tokens=64 * blocks, block_size=64, origin="synthetic", seed=0,
    )  # fmt: skip
    with TraceWriter(folder, header) as writer, writer.step(0) as part:
        heads = tuple(VERTICAL for _ in values)
        part.append(0, LayerPattern(seq_len_tokens=64 * blocks, block_size=64, heads=heads), [CHOICE] * len(values))
    path = folder / "part-00000000.parquet"
    made = [ROW | {"head": head} | one for head, one in enumerate(values)]
    sink = BytesIO()
    options: dict[str, Any] = {"compression": "zstd"} | written
    pq.write_table(pa.Table.from_pylist(made, schema=SCHEMA), sink, **options)
    path.write_bytes(sink.getvalue())
    vouched(path)
    return path


VERTICAL = rows.VerticalSlash(columns=np.zeros(0, np.int32), diagonals=np.zeros(1, np.int32))
CHOICE = rows.HeadChoice(selector="hostile")
ROW = {"training_step": 0, "layer": 0, "selector": "hostile", "settings": "{}", "density": 0.1,
       "kept_mass_probe": None, "kept_mass_sampled": None, "window_tokens": 0, "cut_diagonals": [], "anchor_tokens": 0,
       "kept_mass_documents": None}  # fmt: skip


def refused(path: Path, told: str) -> None:
    assert path.stat().st_size < SMALL
    with one_more_gibibyte(), pytest.raises(InputError, match=told) as caught:
        Trace.open(path.parent).verify()
    assert "\n" not in str(caught.value)


def masks(blocks: int, heads: int) -> list[dict[str, Any]]:
    bits = bytes(packed_bytes(blocks))
    return [MASK | {"block_bits": bits} for _ in range(heads)]


@pytest.mark.parametrize("written", [{}, {"use_dictionary": False}, {"use_dictionary": False, "column_encoding": {
    "block_bits": "DELTA_BYTE_ARRAY"}}], ids=["dictionary", "plain", "shared beginnings"])  # fmt: skip
def test_many_block_masks(tmp_path: Path, written: dict[str, Any]) -> None:
    """64 heads of 8 MiB each, all the same: compressed, as one entry of a dictionary, as one text's beginnings."""
    refused(trace_of(tmp_path / "trace", masks(11500, 64), blocks=11500, **written), "unpacks to .* at most 268435456")


def test_one_mask_of_many_blocks(tmp_path: Path) -> None:
    refused(trace_of(tmp_path / "trace", masks(40000, 1), blocks=40000, use_dictionary=False), "at most 16384 are read")


@pytest.mark.parametrize("name", ["columns", "cut_diagonals"])
def test_a_list_that_repeats_one_number(tmp_path: Path, name: str) -> None:
    values = [DENSE | {name: np.zeros(70_000_000, np.int32)}]
    refused(trace_of(tmp_path / "trace", values, blocks=1 << 21), "unpacks to .* at most 268435456")


@pytest.mark.parametrize("change", [lambda page: b"\0" + page[1:], lambda page: b"\x1f" * 30])
def test_pages_that_are_none(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = trace_of(tmp_path / "trace", [DENSE], blocks=16, use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:4] + change(data[4:40]) + data[4 + len(change(data[4:40])) :])
    vouched(path)
    refused(path, "cannot be decoded")


def test_the_pages_are_believed_and_not_the_footer(tmp_path: Path) -> None:
    """A page that says it unpacks to a gigabyte, under a footer that says a megabyte."""
    path = trace_of(tmp_path / "trace", masks(4200, 1), blocks=4200, use_dictionary=False)
    data = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(8)
    honest = sizes_of_chunk(memoryview(data), chunk)
    place = data.index(varint(honest.unpacked_bytes), chunk.data_page_offset)
    lie = data[:place] + varint((1 << 27) - 1) + data[place + 4 :]
    assert sizes_of_chunk(memoryview(lie), chunk).unpacked_bytes == (1 << 27) - 1
    with pytest.raises(BrokenPage):
        sizes_of_chunk(memoryview(data[: chunk.data_page_offset + 5]), chunk)


def varint(value: int) -> bytes:
    """Thrift's way to write a number that is not negative, here of 2^20 to 2^27: four bytes."""
    value *= 2
    return bytes([value >> shift & 127 | 128 for shift in (0, 7, 14)] + [value >> 21])


def test_what_pages_say_is_what_is_there(tmp_path: Path) -> None:
    settings = SyntheticSettings(seq_len_tokens=4096, heads=4, block_size=64, columns=30)
    for kind in ("vertical-slash", "xattention"):
        write_synthetic_trace(tmp_path / kind, kind, settings)
        (path,) = (tmp_path / kind).glob("*.parquet")
        data, file = path.read_bytes(), pq.ParquetFile(path)
        for number in range(len(SCHEMA)):
            chunk = file.metadata.row_group(0).column(number)
            assert sizes_of_chunk(memoryview(data), chunk).values == chunk.num_values


@pytest.mark.slow
def test_a_layer_over_a_million_tokens_is_read_within_a_gibibyte(tmp_path: Path) -> None:
    """32 block masks of 8,192 blocks: 2 GiB at a byte a pair."""
    bits = np.tri(8192, dtype=bool)
    bits[:, 1::2] &= np.eye(8192, dtype=bool)[:, 1::2]
    layer = LayerPattern(seq_len_tokens=1 << 20, block_size=128, heads=(BlockMask(bits=bits),) * 32)
    header = TraceHeader(
        model=ModelShape(model_id="large", layers=1, heads=32, kv_heads=8, head_dim=128), recorded_layers=(0,),
        seq_len_tokens=1 << 20, block_size=128, origin="synthetic", seed=0,
    )  # fmt: skip
    with TraceWriter(tmp_path / "trace", header) as writer, writer.step(0) as part:
        part.append(0, layer, [CHOICE] * 32)
    del layer
    with one_more_gibibyte():
        found = Trace.open(tmp_path / "trace").layer_pattern(0, 0)
    assert isinstance(found.heads[31], BlockMask) and (found.heads[31].bits == bits).all()
