"""One flipped bit: under a digest every one is refused, and none changes what a timeline says without a word."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from formats import LAPTOP, Format
from sparsering.traces.errors import InputError
from sparsering.traces.timeline import Timeline

if find_spec("torch") is not None:
    from torch_formats import FULL
else:
    FULL: list[Format] = []  # a laptop's installation

FORMATS = {one.name: one for one in [*LAPTOP, *FULL]}
SEALED = [name for name in ("trace-manifest", "trace-rows", "plan", "checkpoint", "data-manifest") if name in FORMATS]
FEW, MANY = 400, 20_000


def flips(data: bytes, count: int) -> list[tuple[int, int]]:
    """Return (byte, bit) of so many flips, seeded; of every bit where there are no more."""
    every = [(place, bit) for place in range(len(data)) for bit in range(8)]
    return every if count >= len(every) else random.Random(0).sample(every, count)


def accepted(path: Path, count: int, read: Callable[[Path], object]) -> list[tuple[int, int, bytes]]:
    """Return the flips that are read without a word, and what stands around them."""
    good, found = path.read_bytes(), []
    read(path)
    for place, bit in flips(good, count):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        try:
            read(path)
        except InputError:
            continue
        found.append((place, bit, good[max(place - 20, 0) : place + 20]))
    path.write_bytes(good)
    return found


@pytest.mark.parametrize("name", SEALED)
def test_flipped_bits_under_a_digest_are_refused(tmp_path: Path, name: str) -> None:
    assert accepted(FORMATS[name].make(tmp_path), FEW, FORMATS[name].read) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SEALED)
def test_many_flipped_bits_under_a_digest_are_refused(tmp_path: Path, name: str) -> None:
    assert accepted(FORMATS[name].make(tmp_path), MANY, FORMATS[name].read) == []


def test_flipped_bits_of_a_compressed_timeline_change_nothing(tmp_path: Path) -> None:
    """Its checksum sees them; those of its header (time, system) say nothing of the timeline."""
    FORMATS["timeline"].make(tmp_path)
    path = tmp_path / "measured.json.gz"
    wanted = Timeline.load(path)

    def read(path: Path) -> None:
        if Timeline.load(path) == wanted:
            raise InputError("the same")

    with pytest.raises(InputError, match="the same"):
        read(path)
    good = path.read_bytes()
    for place, bit in flips(good, 2 * FEW):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        with pytest.raises(InputError):
            read(path)
