"""Tens of thousands of changed files of a format, read one after the other by one process that gets little memory."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from formats import Format
from mutations import mutate, places, spoil
from sparsering.traces.errors import CONTROL, InputError

GIB = 1 << 30
LONGEST_S = 30.0  # a hang, where a usual input takes milliseconds
LONGEST_LINE = 2000
KINDS = 20  # of faults, after which nothing more is looked for
EVERY = 5000  # inputs between two lines that say how far it is
Changes = Callable[[Random], None]  # puts a changed file in the good one's place


def refused_or_read(format: Format, path: Path) -> bool:
    """Return whether a changed file is read; fail unless it is, or is refused in one line that no terminal obeys."""
    try:
        format.read(path)
    except InputError as error:
        told = str(error)
        assert told and "\n" not in told and not CONTROL.search(told), repr(told)
        assert len(told) < LONGEST_LINE, "too long to be read"
        return False
    return True


def changed_values(format: Format, path: Path) -> Changes:
    """Change an example's values, and let its digests fit."""
    assert format.document is not None and format.write is not None
    document, write = format.document(path), format.write
    known = [("", *place) for place in places(document)]
    others = {one: one.read_bytes() for one in path.parent.rglob("*") if one.is_file()}

    def change(dice: Random) -> None:
        for one, data in others.items():
            one.write_bytes(data)
        write(path, mutate(dice, document, known))

    return change


def changed_bytes(format: Format, path: Path) -> Changes:
    """Change an example's bytes, whatever its digests say."""
    good = path.read_bytes()

    def change(dice: Random) -> None:
        path.write_bytes(spoil(dice, good))

    return change


@contextmanager
def one_more_gibibyte() -> Iterator[None]:
    """Let this process have a gibibyte of memory more than it has now: a MemoryError where that does not suffice."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def many(format: Format, path: Path, changes: Changes, count: int, *, first: int = 0) -> list[str]:
    """Return what is wrong with so many changed files, each kind of fault once: empty where all is right.

    Input n is a function of the format and of n, so one can be made again alone: first=n, count=1.
    """
    kinds: dict[str, str] = {}
    read, began, worst_s = 0, time.monotonic(), 0.0
    with one_more_gibibyte():
        for number in range(first, first + count):
            changes(Random(f"{format.name} {number}"))
            started = time.monotonic()
            try:
                read += refused_or_read(format, path)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} in {where.filename}:{where.lineno}"
                kinds.setdefault(kind, f"input {number}: {kind}: {str(error)[:300]}")
            took_s = time.monotonic() - started
            worst_s = max(worst_s, took_s)
            if took_s > LONGEST_S:
                kinds.setdefault("slow", f"input {number}: took {took_s:.0f} s")
            if len(kinds) >= KINDS:
                break
            if (number + 1 - first) % EVERY == 0 or number + 1 == first + count:
                held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                print(
                    f"{format.name}: {number + 1 - first} inputs in {time.monotonic() - began:.0f} s, {read} read, "
                    f"{len(kinds)} kinds of faults, slowest {worst_s:.2f} s, most memory {held} MiB",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    return list(kinds.values())
