"""The columns of a trace's rows, by schema version: what parts of that version hold, no more and no less."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from .manifest import TRACE_SCHEMA_VERSION, SchemaVersion

INT32S = pa.list_(pa.field("element", pa.int32(), nullable=False))
MASSES = ("kept_mass_probe", "kept_mass_sampled")
DOCUMENT_MASSES = "kept_mass_documents"
LISTS = ("columns", "diagonals", "cut_diagonals")
BITS = "block_bits"

_FIRST_TYPES = {
    "training_step": pa.int64(), "layer": pa.int32(), "head": pa.int32(), "kind": pa.string(), "selector": pa.string(),
    "settings": pa.string(), "columns": INT32S, "diagonals": INT32S, BITS: pa.binary(),
    "density": pa.float64(), **dict.fromkeys(MASSES, pa.float64()),
}  # fmt: skip
_WINDOW_TYPES = {"window_tokens": pa.int32(), "cut_diagonals": INT32S}
_DOCUMENT_TYPES = {
    "anchor_tokens": pa.int32(),
    DOCUMENT_MASSES: pa.list_(pa.field("element", pa.float64(), nullable=False)),
}


class RowFormat(NamedTuple):
    """The columns of a part, and what they can say.

    schema: as Arrow has them; windows: heads may have sliding windows; apart: what is chosen for each packed document
    may stand there: block masks with columns, anchors, and masses kept of each document.
    """

    schema: pa.Schema
    windows: bool
    apart: bool

    @property
    def lists(self) -> tuple[str, ...]:
        """The columns that hold lists of numbers."""
        return tuple(name for name in LISTS if name in self.schema.names)

    @property
    def list_leaves(self) -> tuple[str, ...]:
        """The same as Parquet names them."""
        return tuple(f"{name}.list.element" for name in self.lists)

    @property
    def leaves(self) -> tuple[str, ...]:
        """All columns as Parquet names them."""
        plain = [name for name in self.schema.names if name not in (*LISTS, DOCUMENT_MASSES)]
        return (*plain, *self.list_leaves, *([f"{DOCUMENT_MASSES}.list.element"] if self.apart else []))


def _schema(types: dict[str, pa.DataType]) -> pa.Schema:
    missing = (BITS, *MASSES, DOCUMENT_MASSES)
    return pa.schema([pa.field(name, kind, nullable=name in missing) for name, kind in types.items()])


FORMATS: dict[SchemaVersion, RowFormat] = {
    1: RowFormat(_schema(_FIRST_TYPES), windows=False, apart=False),
    2: RowFormat(_schema(_FIRST_TYPES | _WINDOW_TYPES), windows=True, apart=False),
    3: RowFormat(_schema(_FIRST_TYPES | _WINDOW_TYPES | _DOCUMENT_TYPES), windows=True, apart=True),
}
NEWEST = FORMATS[TRACE_SCHEMA_VERSION]
SCHEMA = NEWEST.schema
