"""The columns of a trace's rows, by schema version: what parts of that version hold, no more and no less."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from .manifest import TRACE_SCHEMA_VERSION, SchemaVersion

INT32S = pa.list_(pa.field("element", pa.int32(), nullable=False))
MASSES = ("kept_mass_probe", "kept_mass_sampled")
LISTS = ("columns", "diagonals", "cut_diagonals")
BITS = "block_bits"

_FIRST_TYPES = {
    "training_step": pa.int64(), "layer": pa.int32(), "head": pa.int32(), "kind": pa.string(), "selector": pa.string(),
    "settings": pa.string(), "columns": INT32S, "diagonals": INT32S, BITS: pa.binary(),
    "density": pa.float64(), **dict.fromkeys(MASSES, pa.float64()),
}  # fmt: skip
_WINDOW_TYPES = {"window_tokens": pa.int32(), "cut_diagonals": INT32S}


class RowFormat(NamedTuple):
    """The columns of a part. schema: as Arrow has them; windows: whether heads may have sliding windows."""

    schema: pa.Schema
    windows: bool

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
        return (*(name for name in self.schema.names if name not in LISTS), *self.list_leaves)


def _schema(types: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in (BITS, *MASSES)) for name, kind in types.items()])


FORMATS: dict[SchemaVersion, RowFormat] = {
    1: RowFormat(_schema(_FIRST_TYPES), windows=False),
    2: RowFormat(_schema(_FIRST_TYPES | _WINDOW_TYPES), windows=True),
}
NEWEST = FORMATS[TRACE_SCHEMA_VERSION]
SCHEMA = NEWEST.schema
