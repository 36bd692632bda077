"""JSON from unknown hands: what reading it may cost is bounded before any value of it is made, and nothing is guessed.

A file of a few bytes can ask for gigabytes (`[{},{},…` takes eighty bytes of memory for three of text), for a stack
that overflows, or for numbers that no machine has. So the text is scanned first: its values and how deep they are
nested. Then it is parsed strictly: UTF-8, whole numbers of 64 bits, finite numbers, no key twice in an object, and no
text with control characters, which a terminal would obey.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CONTROL, InputError, field_name, shown

MAX_DEPTH = 64
MAX_VALUES = 8 << 20  # at 64 bytes each, 96 in the worst case, less than a gigabyte
INT64 = range(-(1 << 63), 1 << 63)
MOST_DIGITS = 20  # of a whole number of 64 bits, its sign counted
_BRACKETS = b"[]{}"
_ALL_BUT_BRACKETS_AND_QUOTES = bytes(set(range(256)) - set(_BRACKETS + b'"'))


def parse_json(data: bytes, source: str | Path, *, max_values: int = MAX_VALUES, exact: bool = False) -> Any:
    """Return what UTF-8 JSON says, as dict, list, str, bool, int, float or None. InputError, in one line, where not.

    max_values: how many values there may be, names of an object's keys counted. exact: numbers must be written as
    Python writes them, so that no two texts have the same digest of their values.
    """
    require_small(data, source, max_values)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"is not valid JSON (no UTF-8: {error.reason})", source=source) from error
    reader = _Reader(exact)
    try:
        value = json.loads(
            text, parse_constant=reader.constant, parse_int=reader.whole, parse_float=reader.number,
            object_pairs_hook=reader.mapping,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON ({error})", source=source) from error
    if reader.refused or "\\" in text or "\x7f" in text or not text.isascii():  # else nothing can be wrong
        for place, problem in _problems(value, ()):
            raise InputError(problem, source=source, field=field_name(place) or None)
    return value


def require_small(data: bytes, source: str | Path, max_values: int = MAX_VALUES) -> None:
    """Refuse too many or too deeply nested values, by the text alone: InputError.

    Signs within strings count as values too, where they look like some.
    """
    values = sum(data.count(sign) for sign in (b",", b":", b"[", b"{"))
    if values > max_values:
        raise InputError(f"holds {values} values; at most {max_values} are read", source=source)
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        raise InputError(f"is nested more than {MAX_DEPTH} deep", source=source)


def _depth(data: bytes) -> int:
    """Return how deep the brackets outside strings are nested."""
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a string
    signs = np.frombuffer(plain.translate(None, _ALL_BUT_BRACKETS_AND_QUOTES), dtype=np.uint8)
    outside = np.cumsum(signs == ord('"'), dtype=np.int32) % 2 == 0
    signs = signs[outside & (signs != ord('"'))]
    opening = (signs == ord("[")) | (signs == ord("{"))
    return int(np.cumsum(np.where(opening, 1, -1), dtype=np.int32).max(initial=0))


@dataclass(frozen=True)
class _Refused:
    """Stands where a value is that cannot be taken at its word, until it is known which field that is."""

    problem: str


class _Reader:
    """What the parser calls for every number and every object. refused: whether a value was."""

    def __init__(self, exact: bool) -> None:
        self._exact = exact
        self.refused = False

    def constant(self, name: str) -> _Refused:
        return self._refuse(f"{name} is not a number")

    def whole(self, text: str) -> int | _Refused:
        value = int(text) if len(text) <= MOST_DIGITS else INT64.stop
        if value not in INT64:
            return self._refuse(f"{shown(text)} is no whole number of 64 bits")
        return self._as_written(value, text)

    def number(self, text: str) -> float | _Refused:
        value = float(text)
        return self._as_written(value, text) if isfinite(value) else self._refuse(f"{shown(text)} is no finite number")

    def mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Refused:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        return self._refuse(f"the key {shown(again)} is given twice")

    def _as_written(self, value: Any, text: str) -> Any:
        if self._exact and repr(value) != text:
            return self._refuse(f"the number {shown(text)} is not written as {value!r}: altered")
        return value

    def _refuse(self, problem: str) -> _Refused:
        self.refused = True
        return _Refused(problem)


def _problems(value: Any, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield where a value was refused or text has characters that are none, and what is wrong with it."""
    if isinstance(value, _Refused):
        yield place, value.problem
    elif isinstance(value, str):
        if odd := CONTROL.search(value):
            yield place, f"{shown(value)} holds U+{ord(odd[0]):04X}, which is no text"
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _problems(key, place)
            yield from _problems(one, (*place, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _problems(one, (*place, number))
