"""Hostile changes of a good document: keys dropped, replaced, repeated; absurd numbers, types, lengths, depths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

Place = tuple[Any, ...]
TWICE = "\0twice:"  # a key that begins with this is written as the rest: one object has it twice
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 64, 4095, 4097, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**9, 10**30, -(10**30),
    10**400,
    0.5, -0.0, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan, "", " ", "0", "1", "1e9", "NaN", "x" * 5000,
    "../../etc/passwd",
    "/dev/zero", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\rb", "\u202egnp", "\x9b31m", "\0",
    "\ud800", "é", "😀", "%s{0}{x.__class__}", "<script>alert(1)</script>", [], {}, [[]], [None], {"": None}, {"0": {}},
    [0] * 2000, ["x"] * 300, {str(number): number for number in range(300)}, DEEP,
]  # fmt: skip
BYTES = [b"", b"\0", b"\xff", b"\xff" * 64, b"\x1b[31m", b"[" * 200, b"{" * 200, b'"', b"1e999", b"9" * 5000, b"NaN",
         b"\n",         b"\xef\xbb\xbf", b"\xed\xa0\x80", b"*a", b"&a [*a]", b"\x1f\x8b"]  # fmt: skip


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Yield the place of every value in a document, as the keys that lead to it."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*here, key))


def found(document: Any, place: Place) -> Any:
    """Return the value at a place."""
    for key in place:
        document = document[key]
    return document


def _replace(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


def _drop(holder: Any, key: Any, _: Any) -> None:
    del holder[key]


def _beside(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict):
        holder["unknown"] = value
    else:
        holder.insert(key, value)


def _again(holder: Any, key: Any, _: Any) -> None:
    if isinstance(holder, dict):
        holder[f"{TWICE}{key}"] = holder[key]
    else:
        holder.insert(key, deepcopy(holder[key]))


def _renamed(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict):
        holder[str(value)[:300]] = holder.pop(key)
    else:
        holder[key] = value


def _nudged(holder: Any, key: Any, value: Any) -> None:
    old = holder[key]
    if type(old) in (int, float):
        kinds = [old + 1, old - 1, -old, old * 1000, str(old), old / 3 if abs(old) < 1e300 else old]
        holder[key] = kinds[len(repr(value)) % len(kinds)]
    elif isinstance(old, list):
        holder[key] = old * 3 if len(old) < 300 else old[:1]
    else:
        holder[key] = [old]


ACTIONS: list[Callable[[Any, Any, Any], None]] = [_replace, _replace, _drop, _beside, _again, _renamed, _nudged]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three changes, anywhere in it."""
    document = {"": deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        all_places = [place for place in places(document) if place]
        place = all_places[draw(st.integers(0, len(all_places) - 1))]
        action, value = draw(st.sampled_from(ACTIONS)), deepcopy(draw(st.sampled_from(VALUES)))
        if draw(st.integers(0, 7)) == 0:  # what stands somewhere else in it
            value = deepcopy(found(document, all_places[draw(st.integers(0, len(all_places) - 1))]))
        if len(place) == 1:
            document[""] = value
        else:
            action(found(document, place[:-1]), place[-1], value)
    return document[""]


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four of them flipped, cut out, repeated, or others put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 64)))
        action = draw(st.sampled_from(["flip", "cut", "repeat", "insert", "end"]))
        if action == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
        elif action == "cut":
            data = data[:start] + data[stop:]
        elif action == "repeat":
            data = data[:stop] + data[start:stop] * draw(st.integers(1, 50)) + data[stop:]
        elif action == "insert":
            data = data[:start] + draw(st.sampled_from(BYTES)) + data[start:]
        elif action == "end":
            data = data[:start]
    return data


def as_json(document: Any) -> bytes:
    """Return a document as text, however odd: NaN, repeated keys and halves of characters stay."""
    text = json.dumps(document).replace(json.dumps(TWICE)[:-1], '"')
    return text.encode()
