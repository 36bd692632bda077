"""Writing traces: parts are compressed layer by layer, renamed into place, and then listed in the manifest.

A part is renamed into place before the manifest that lists it, and a folder with its first manifest in it, so a writer
that is killed at any moment leaves a readable trace. Within a part each layer is a row group of its own, so that one
layer can be read alone.
"""

from __future__ import annotations

import fcntl
import io
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel

from ..errors import InputError, shown
from ..files import sha256_of_bytes, write_atomically
from ..pattern import LayerPattern
from .manifest import MANIFEST_NAME, TraceHeader, TraceManifest, TracePart, make_manifest, read_manifest, write_manifest
from .row_formats import BITS, FORMATS, RowFormat
from .rows import HeadChoice, encode_layer
from .whole_folder import begun_folder

ZSTD_LEVEL = 9
BITS_ZSTD_LEVEL = 1  # of block masks: 9 takes ten times as long and saves less than a sixth

LayerRecord: TypeAlias = tuple[LayerPattern, Sequence[HeadChoice]]


class TraceWriter:
    """Appends training steps to a trace, new or existing. One writer at a time; use as a context manager.

    An existing trace goes on in the schema version that it is of, so that all its parts are alike.
    Raises InputError when the folder holds something else, when another writer has it open, or when an existing
    trace's header differs from `header`.
    """

    def __init__(self, folder: Path | str, header: TraceHeader) -> None:
        self.folder = Path(folder)
        self.header = header
        begun = make_manifest(header, ())
        handle = begun_folder(self.folder, lambda working: write_manifest(working, begun))
        self._is_new = self._made = handle is not None
        self._release = weakref.finalize(self, _unlock, _lock(self.folder) if handle is None else handle)
        try:
            self._manifest = begun if self._made else self._open_or_start(begun)
        except BaseException:
            self._undo()
            self._release()
            raise

    def _open_or_start(self, begun: TraceManifest) -> TraceManifest:
        # Temporary files of a writer that was killed: the lock is held, so none of them is in use.
        for pattern in (".part-*.parquet.*.partial", f".{MANIFEST_NAME}.*.partial"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        file = self.folder / MANIFEST_NAME
        if file.exists():
            manifest = read_manifest(self.folder)
            for name in TraceHeader.model_fields:
                there, here = getattr(manifest.header, name), getattr(self.header, name)
                if there != here:
                    raise _another(there, here, file, name)
            return manifest
        foreign = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
        if foreign:
            raise InputError(f"is not empty and is no trace: it holds {foreign[0]!r}", source=self.folder)
        self._is_new = True
        write_manifest(self.folder, begun)
        return begun

    def _undo(self) -> None:
        """Leave nothing of a trace that this writer began; a folder that was there before stays."""
        if self._is_new:
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        if self._made:
            with suppress(OSError):
                self.folder.rmdir()

    @property
    def steps(self) -> tuple[int, ...]:
        """Training steps recorded so far, ascending."""
        return tuple(part.training_step for part in self._manifest.parts)

    @property
    def next_step(self) -> int:
        """The training step after the last recorded one; 0 for an empty trace."""
        return self.steps[-1] + 1 if self.steps else 0

    def append(self, training_step: int, layers: Mapping[int, LayerRecord]) -> None:
        """Write one training step: layer -> (pattern, one HeadChoice per head), for all recorded layers."""
        with self.step(training_step) as step:
            for layer in sorted(layers):
                step.append(layer, *layers[layer])

    @contextmanager
    def step(self, training_step: int) -> Iterator[StepWriter]:
        """Open one training step; its layers are appended in ascending order and compressed as they come.

        Nothing reaches the trace when the body raises, or unless all recorded layers were appended.
        """
        if self.steps and training_step <= self.steps[-1]:
            problem = f"{training_step} does not follow {self.steps[-1]}, the last one recorded"
            raise InputError(problem, source=self.folder, field="training_step")
        version = self._manifest.schema_version
        step = StepWriter(self.header, training_step, FORMATS[version])
        yield step
        data = step.finish()
        part = TracePart(
            file=f"part-{step.training_step:08d}.parquet",
            sha256=sha256_of_bytes(data),
            training_step=step.training_step,
            rows=self.header.rows_per_part,
            bytes=len(data),
            document_starts_tokens=step.document_starts_tokens,
        )
        manifest = make_manifest(self.header, (*self._manifest.parts, part), schema_version=version)
        try:
            write_atomically(self.folder / part.file, data)
            write_manifest(self.folder, manifest)
        except BaseException:  # also Ctrl-C: a manifest that is in its place counts, a part that it does not list goes
            self._manifest = read_manifest(self.folder)
            if part not in self._manifest.parts:
                (self.folder / part.file).unlink(missing_ok=True)
            raise
        self._manifest = manifest

    def close(self) -> None:
        """Let other writers have the trace. Everything appended is already on disk."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None and self._is_new and not self.steps:  # nothing was recorded
            self._undo()
        self.close()


def _another(there: Any, here: Any, file: Path, name: str) -> InputError:
    """Return the refusal to go on with a trace whose header has another value, or another part of a value."""
    for part in type(there).model_fields if isinstance(there, BaseModel) and type(there) is type(here) else ():
        if getattr(there, part) != getattr(here, part):
            return _another(getattr(there, part), getattr(here, part), file, f"{name}.{part}")
    return InputError(f"the trace has {shown(there)}, not {shown(here)}: start another trace", source=file, field=name)


class StepWriter:
    """Gathers one training step's layers, compressed in memory as they come. Made by `TraceWriter.step`."""

    def __init__(self, header: TraceHeader, training_step: int, row_format: RowFormat) -> None:
        self.header, self._format = header, row_format
        self.training_step = training_step
        self.document_starts_tokens: tuple[int, ...] | None = None
        self._written = 0
        self._buffer = io.BytesIO()
        self._parquet = pq.ParquetWriter(
            self._buffer,
            row_format.schema,
            compression="zstd",
            compression_level={path: BITS_ZSTD_LEVEL if path == BITS else ZSTD_LEVEL for path in row_format.leaves},
            use_dictionary=False,  # would take the place of the delta encoding
            column_encoding=dict.fromkeys(row_format.list_leaves, "DELTA_BINARY_PACKED"),
            write_statistics=False,
        )

    def append(self, layer: int, pattern: LayerPattern, choices: Sequence[HeadChoice]) -> None:
        """Add the next recorded layer. choices: one per head. InputError when it does not fit the header."""
        if self._written == len(self.header.recorded_layers) or layer != self.header.recorded_layers[self._written]:
            expected = (*self.header.recorded_layers, "nothing")[self._written]
            raise InputError(f"layer {layer} was appended where {expected} is expected", field="layer")
        for name, actual, expected in (
            ("heads", pattern.num_heads, self.header.model.heads),
            ("seq_len_tokens", pattern.seq_len_tokens, self.header.seq_len_tokens),
            ("block_size", pattern.block_size, self.header.block_size),
        ):
            if actual != expected:
                raise InputError(f"the pattern has {actual}, the trace {expected}", field=f"layer {layer}, {name}")
        starts = None
        if pattern.documents is not None:
            starts = (0, *(int(place) + 1 for place in np.flatnonzero(np.diff(pattern.documents))))
        if self._written == 0:
            self.document_starts_tokens = starts
        elif starts != self.document_starts_tokens:
            raise InputError("all layers of a step must share their documents", field=f"layer {layer}, documents")
        for number, choice in enumerate(choices):
            if choice.kept_mass_documents is not None and len(choice.kept_mass_documents) != len(starts or ()):
                problem = f"has {len(choice.kept_mass_documents)}, the pattern {len(starts or ())} documents"
                raise InputError(problem, field=f"layer {layer}, head {number}, kept_mass_documents")
        table = encode_layer(self.training_step, layer, pattern, choices, row_format=self._format)
        self._parquet.write_table(table, row_group_size=table.num_rows)
        self._written += 1

    def finish(self) -> bytes:
        """Return the part's bytes; InputError when a recorded layer is missing."""
        if self._written < len(self.header.recorded_layers):
            missing = self.header.recorded_layers[self._written]
            raise InputError(f"layer {missing} is missing from training step {self.training_step}", field="layer")
        self._parquet.close()
        return self._buffer.getvalue()


def _lock(folder: Path) -> int:
    """Make the folder, take its advisory lock and return the handle that holds it. A killed process lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise InputError("is being written by another process", source=folder) from error
    return handle


def _unlock(handle: int) -> None:
    # Said explicitly: a forked child may hold a copy of the handle, and closing ours alone would not let go.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
