"""Hostile changes of a good document: keys dropped, replaced, repeated; absurd numbers, types, lengths, depths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any

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


def named_places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Yield the place of every value that has a name; of what a list holds, that of its first and last."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield (*here, key)
            yield from named_places(one, (*here, key))
    elif isinstance(value, list) and value:
        for number in {0, len(value) - 1}:
            yield from named_places(value[number], (*here, number))


def left_out(document: Any, place: Place) -> Any:
    """Return a copy without the value at a place."""
    changed = deepcopy(document)
    del found(changed, place[:-1])[place[-1]]
    return changed


def nulled(document: Any, place: Place) -> Any:
    """Return a copy with null at a place."""
    changed = deepcopy(document)
    found(changed, place[:-1])[place[-1]] = None
    return changed


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


def copied(value: Any) -> Any:
    """Return a document of its own that is equal; quicker than what copies any object."""
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


def mutate(dice: Random, document: Any, known: list[Place] | None = None) -> Any:
    """Return a document with one to three changes, anywhere in it. known: the places of the unchanged one."""
    changed = {"": copied(document)}
    for turn in range(dice.randint(1, 3)):
        all_places = known if known and not turn else [("", *place) for place in places(changed[""])]
        place = dice.choice(all_places)
        action, value = dice.choice(ACTIONS), copied(dice.choice(VALUES))
        if dice.randint(0, 7) == 0:  # what stands somewhere else in it
            value = copied(found(changed, dice.choice(all_places)))
        if len(place) == 1:
            changed[""] = value
        else:
            action(found(changed, place[:-1]), place[-1], value)
    return changed[""]


def spoil(dice: Random, data: bytes) -> bytes:
    """Return bytes with one to four of them flipped, cut out, repeated, or others put in."""
    for _ in range(dice.randint(1, 4)):
        start = dice.randint(0, len(data))
        stop = min(len(data), start + dice.randint(0, 64))
        action = dice.choice(["flip", "cut", "repeat", "insert", "end"])
        if action == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << dice.randint(0, 7)]) + data[start + 1 :]
        elif action == "cut":
            data = data[:start] + data[stop:]
        elif action == "repeat":
            data = data[:stop] + data[start:stop] * dice.randint(1, 50) + data[stop:]
        elif action == "insert":
            data = data[:start] + dice.choice(BYTES) + data[start:]
        elif action == "end":
            data = data[:start]
    return data


def as_json(document: Any) -> bytes:
    """Return a document as text, however odd: NaN, repeated keys and halves of characters stay."""
    text = json.dumps(document).replace(json.dumps(TWICE)[:-1], '"')
    return text.encode()
