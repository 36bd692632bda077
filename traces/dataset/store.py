"""Reading traces: a folder of Parquet parts, one per training step, and `manifest.json` that vouches for them.

Bytes are read once, compared with their digest, and only then parsed. A part that no manifest lists (its writer was
killed) is ignored and reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import InputError
from ..files import read_bytes, sha256_of_bytes
from ..pattern import LayerPattern
from ..progress import Progress, no_progress
from ..samples.located import located
from .manifest import TraceHeader, TraceManifest, TracePart, read_manifest
from .pages import BrokenPage, sizes_of_chunk
from .row_formats import FORMATS
from .rows import HeadRow, decode_layer, max_layer_bytes

MAX_THRIFT_BYTES = 64 << 20
PLAIN_TEXT = frozenset({0, 6})  # Parquet's PLAIN and DELTA_LENGTH_BYTE_ARRAY: every value stands there in full
MOST_VALUE_BYTES = 8  # of a number, or of a text's length


class Trace:
    """A trace opened for reading. Use `Trace.open`."""

    def __init__(self, folder: Path, manifest: TraceManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._parts = {part.training_step: part for part in manifest.parts}
        self._open_part: tuple[int, pq.ParquetFile, memoryview] | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Trace:
        """Read the manifest and check that every listed part is there in full length.

        folder: a trace, or `sample:` and the name of one that comes with the package (traces/samples/README.md).
        Parts are compared with their digests when they are read (`verify` reads all). InputError in one line.
        """
        path = located(folder)
        trace = cls(path, read_manifest(path))
        for part in trace.manifest.parts:
            _check_size(path / part.file, part)
        return trace

    @property
    def header(self) -> TraceHeader:
        """Model, shape, layers, sequence length, block size, origin, seed and versions."""
        return self.manifest.header

    @property
    def steps(self) -> tuple[int, ...]:
        """Recorded training steps, ascending."""
        return tuple(self._parts)

    @property
    def layers(self) -> tuple[int, ...]:
        """Recorded layers, ascending."""
        return self.header.recorded_layers

    def digest(self) -> str:
        """Return the SHA-256 that stands for the whole trace: of the manifest, which holds those of the parts."""
        return self.manifest.digest

    @property
    def unlisted_parts(self) -> tuple[str, ...]:
        """Parquet files in the folder that the manifest does not list (a writer was killed): ignored, to be shown."""
        listed = {part.file for part in self.manifest.parts}
        return tuple(sorted(path.name for path in self.folder.glob("*.parquet") if path.name not in listed))

    def layer_rows(self, training_step: int, layer: int) -> tuple[HeadRow, ...]:
        """Return the checked rows of one layer in head order."""
        if layer not in self.layers:
            raise InputError(f"{layer} was not recorded", source=self.folder, field="layer")
        source = self.folder / self._part(training_step).file
        table = self._read_row_group(training_step, self.layers.index(layer))
        starts = self._part(training_step).document_starts_tokens
        return decode_layer(
            table, self.header, training_step=training_step, layer=layer, source=source,
            documents=None if starts is None else len(starts),
        )  # fmt: skip

    def heads(self, training_step: int) -> tuple[HeadRow, ...]:
        """Return the checked rows of one training step, by layer, then head."""
        return tuple(row for layer in self.layers for row in self.layer_rows(training_step, layer))

    def layer_pattern(self, training_step: int, layer: int) -> LayerPattern:
        """Return what all heads of one layer attend to in one training step."""
        return self.pattern_of_rows(self.layer_rows(training_step, layer))

    def pattern_of_rows(self, rows: tuple[HeadRow, ...]) -> LayerPattern:
        """Return what all heads of one layer attend to, from its rows. InputError where their anchors do not fit."""
        anchors = {row.anchor_tokens for row in rows}
        source = self.folder / self._part(rows[0].training_step).file
        if len(anchors) > 1:
            problem = f"differs between the heads of layer {rows[0].layer}: {sorted(anchors)}"
            raise InputError(problem, source=source, field="anchor_tokens")
        try:
            return LayerPattern(
                seq_len_tokens=self.header.seq_len_tokens,
                block_size=self.header.block_size,
                heads=tuple(row.pattern for row in rows),
                documents=self.documents(rows[0].training_step),
                anchor_tokens=anchors.pop(),
            )
        except InputError as error:
            raise InputError(f"layer {rows[0].layer}, {error}", source=source) from error

    def documents(self, training_step: int) -> NDArray[np.int32] | None:
        """Return int32 [S], the document of each token counted from 0; None when the step is one document."""
        starts = self._part(training_step).document_starts_tokens
        if starts is None:
            return None
        lengths = np.diff([*starts, self.header.seq_len_tokens])
        return np.repeat(np.arange(len(starts), dtype=np.int32), lengths)

    def verify(self, *, progress: Progress = no_progress) -> None:
        """Read and check every row of every part; InputError at the first thing that is wrong."""
        for _ in self.each_layer(progress=progress):
            pass

    def each_layer(self, *, progress: Progress = no_progress) -> Iterator[tuple[HeadRow, ...]]:
        """Yield the checked rows of one layer after the other, step by step: a part is read and compared once."""
        recorded = list(product(self.steps, self.layers))
        for number, (training_step, layer) in enumerate(recorded):
            progress("reading the trace", number, len(recorded))
            yield self.layer_rows(training_step, layer)
        progress("reading the trace", len(recorded), len(recorded))

    def _part(self, training_step: int) -> TracePart:
        if training_step not in self._parts:
            raise InputError(f"{training_step} was not recorded", source=self.folder, field="training_step")
        return self._parts[training_step]

    def _read_row_group(self, training_step: int, number: int) -> pa.Table:
        part = self._part(training_step)
        path = self.folder / part.file
        if self._open_part is None or self._open_part[0] != training_step:
            self._open_part = (training_step, *_open_parquet(path, part, self.manifest))
        file, data = self._open_part[1:]
        try:
            needed_bytes = _needed_bytes(data, file.metadata.row_group(number))
        except (BrokenPage, pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"cannot be decoded ({error})", source=path, field=f"row group {number}") from error
        if needed_bytes > (most_bytes := max_layer_bytes(self.header)):
            problem = f"unpacks to {needed_bytes} bytes; at most {most_bytes} are read"
            raise InputError(problem, source=path, field=f"row group {number}")
        try:
            table = file.read_row_group(number, use_threads=False)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"cannot be decoded ({error})", source=path, field=f"row group {number}") from error
        return table


def _check_size(path: Path, part: TracePart) -> None:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise InputError(f"is listed in the manifest and cannot be read: {error.strerror}", source=path) from error
    if size_bytes != part.bytes:
        raise InputError(f"is {size_bytes} bytes, the manifest says {part.bytes}", source=path, field="bytes")


def _needed_bytes(data: memoryview, group: pq.RowGroupMetaData) -> int:
    """Return what one layer takes in memory at most once it is unpacked; BrokenPage where its pages do not say it.

    Where texts may repeat each other (a dictionary, shared beginnings), each may be as long as all that is there.
    """
    needed_bytes = 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        sizes = sizes_of_chunk(data, chunk)
        repeats = chunk.physical_type == "BYTE_ARRAY" and not sizes.encodings <= PLAIN_TEXT
        unpacked_bytes = sizes.unpacked_bytes * max(1, sizes.values) if repeats else sizes.unpacked_bytes
        needed_bytes += unpacked_bytes + MOST_VALUE_BYTES * sizes.values
    return needed_bytes


def _open_parquet(path: Path, part: TracePart, manifest: TraceManifest) -> tuple[pq.ParquetFile, memoryview]:
    """Return a part, opened, and its bytes."""
    _check_size(path, part)
    data = read_bytes(path, max_bytes=part.bytes)
    actual = sha256_of_bytes(data)
    if actual != part.sha256:
        raise InputError(f"is {actual}, the manifest says {part.sha256}: altered", source=path, field="sha256")
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data),
            thrift_string_size_limit=MAX_THRIFT_BYTES,
            thrift_container_size_limit=MAX_THRIFT_BYTES // 64,
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"is not a Parquet file ({error})", source=path) from error
    header, version = manifest.header, manifest.schema_version
    if not file.schema_arrow.equals(FORMATS[version].schema):
        problem = f"has other fields or types than a trace of schema version {version} has"
        raise InputError(problem, source=path, field="schema")
    for name, actual, expected in (
        ("rows", file.metadata.num_rows, header.rows_per_part),
        ("layers", file.metadata.num_row_groups, len(header.recorded_layers)),
    ):
        if actual != expected:
            raise InputError(f"has {actual}, {expected} are expected", source=path, field=name)
    return file, memoryview(data)
