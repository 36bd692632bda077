"""What the pages of a Parquet file say of themselves, read before anything in them is unpacked.

A page of a few bytes can hold gigabytes: compressed, or as one value and how often it stands there. The footer says how
much there is, but nothing makes it say the truth; what a reader allocates follows from the header that stands before
each page. These headers are Thrift structures in the compact protocol (Parquet's `parquet.thrift`: PageHeader).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow.parquet as pq

MAX_DEPTH = 8
MAX_FIELDS = 256  # of one header; Parquet's has about ten
UNPACKED_BYTES, PACKED_BYTES = 2, 3
# Where a page's header says how many values it holds, and how they are encoded: data, dictionary, data of version 2.
KINDS_OF_PAGES = {5: (1, 2), 7: (1, 2), 8: (1, 4)}
_TRUE, _FALSE, _BYTE, _WHOLE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, 9, 10, 12


class PageSizes(NamedTuple):
    """Bytes that the pages take when they are unpacked, values in them, and how those are encoded, by number."""

    unpacked_bytes: int
    values: int
    encodings: frozenset[int]


class BrokenPage(ValueError):
    """A header that is none, or pages that are not where the footer says."""


def sizes_of_chunk(data: memoryview, chunk: pq.ColumnChunkMetaData) -> PageSizes:
    """Return the sizes of one column of one row group, by its pages' headers. BrokenPage where they are none."""
    starts = [chunk.data_page_offset, chunk.dictionary_page_offset if chunk.has_dictionary_page else None]
    at = min(start for start in starts if start is not None)
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= len(data):
        raise BrokenPage(f"pages from byte {at} to {end} of {len(data)}")
    unpacked_bytes = values = 0
    encodings: set[int] = set()
    while at < end:
        reader = _Compact(data, at)
        header = reader.struct()
        sizes = [header.get(name) for name in (UNPACKED_BYTES, PACKED_BYTES)]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise BrokenPage(f"the page at byte {at} has no sizes")
        unpacked_bytes += sizes[0]  # pyright: ignore[reportOperatorIssue]  # whole numbers, see above
        for kind in KINDS_OF_PAGES.keys() & header.keys():
            if not isinstance(header[kind], dict):
                raise BrokenPage(f"the page at byte {at} is of no kind")
            count, encoding = (header[kind].get(name) for name in KINDS_OF_PAGES[kind])
            if type(count) is not int or type(encoding) is not int or count < 0:
                raise BrokenPage(f"the page at byte {at} says nothing of its values")
            values += count
            encodings.add(encoding)
        at = reader.at + sizes[1]  # pyright: ignore[reportOperatorIssue]
    return PageSizes(unpacked_bytes, values, frozenset(encodings))


class _Compact:
    """A reader of Thrift's compact protocol, from a place in a buffer on."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self.at, self._fields = data, at, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return a structure's fields by their numbers; lists and texts as None."""
        found, field = {}, 0
        for kind, more in iter(self._field, (0, 0)):
            field = field + more if more else self._whole()
            found[field] = self._value(kind, depth)
        return found

    def _field(self) -> tuple[int, int]:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise BrokenPage(f"a header of more than {MAX_FIELDS} fields")
        byte = self._byte()
        return (byte & 15, byte >> 4) if byte else (0, 0)

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise BrokenPage(f"a header nested more than {MAX_DEPTH} deep")
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in _WHOLE:
            return self._whole()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            for element in self._elements():
                self._value(element, depth + 1)
        elif kind in (_BYTE, _DOUBLE, _BINARY):
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._count()  # reading it moves on, too
            self.at += length
        else:
            raise BrokenPage(f"a field of an unknown kind, {kind}")
        return None

    def _elements(self) -> Iterator[int]:
        byte = self._byte()
        count = byte >> 4 if byte >> 4 < 15 else self._count()
        self._fields += count
        if self._fields > MAX_FIELDS:
            raise BrokenPage(f"a header of more than {MAX_FIELDS} fields")
        return iter([byte & 15] * count)

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise BrokenPage("a header that is cut off")
        self.at += 1
        return self._data[self.at - 1]

    def _count(self) -> int:
        """Return a number without a sign, seven bits a byte, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise BrokenPage("a number that does not end")

    def _whole(self) -> int:
        """Return a number with its sign in the lowest bit."""
        value = self._count()
        return value >> 1 ^ -(value & 1)
