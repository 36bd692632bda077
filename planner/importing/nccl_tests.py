"""Tables that nccl-tests print, and the line through them: what a port's latency and bandwidth were measured to be.

Columns: size (B), count, type, redop, root, then time (us), algbw, busbw (GB/s) and #wrong, out of place and again in
place. Older versions lack root or redop, and say `error` for #wrong; all are read from the right. What a port carries:
`size` in a ring of sends and receives, (n - 1) / n of it where n ranks gather or exchange (nccl-tests,
doc/PERFORMANCE.md). The out-of-place times are used: in place, sends and receives would share a buffer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from ...traces.errors import InputError, UnsupportedError, shown, unknown_name
from .texts import text_lines

TESTS = ("sendrecv_perf", "all_gather_perf", "alltoall_perf")
FEWEST_SIZES = 3
BANDWIDTH_FROM_BYTES = 8 << 20  # smaller messages do not fill a port
LATENCY_UP_TO_BYTES = 1 << 20  # larger messages do not show what it takes to begin
WIDTHS = range(10, 14)  # of a row, in words: with and without type, redop and root
MOST_RANK_DIGITS = 9
LEAST_US = 1e-9  # less is no time, and dividing by it is no rate
MIDDLE = 8  # the words of a row's two measurements


@dataclass(frozen=True, kw_only=True)
class NcclTable:
    """One table. rows: (bytes of a port, microseconds) by message size; hosts and gpus: names, of each rank in turn."""

    test: str
    hosts: tuple[str, ...]
    gpus: tuple[str, ...]
    rows: tuple[tuple[float, float], ...]

    @property
    def ranks(self) -> int:
        """How many took part."""
        return len(self.hosts)

    @property
    def nodes(self) -> int:
        """On how many hosts."""
        return len(set(self.hosts))


@dataclass(frozen=True, kw_only=True)
class PortLine:
    """A port's line: time = latency_us + bytes / bandwidth. Errors are relative, of the line over what was measured.

    latency_us: None where the messages are too large to tell; sizes: how many messages it was fitted to.
    """

    latency_us: float | None
    bandwidth_bytes_per_us: float
    sizes: int
    median_error: float
    largest_error: float


def read_nccl_table(path: Path, *, test: str | None = None) -> NcclTable:
    """Read the output of one test. test: which it was, for versions that do not print it.

    Raises InputError where rows cannot be read or their results were wrong, UnsupportedError for other tests.
    """
    lines = text_lines(path)
    name = _test_name(lines, test, path)
    ranks: dict[int, tuple[str, str]] = {}
    rows: list[tuple[float, float]] = []
    ratio = math.nan
    for number, line in enumerate(lines, start=1):
        place = re.search(r"\bRank\s+(\d+)\s.*\son\s+(\S+)\s+device\s+\d+\s+\[\S+\]\s+(\S.*)", line)
        words = line.split()
        if place:
            ranks[_rank(place[1], path, number)] = place[2], place[3].strip()
        elif len(words) >= MIDDLE and words[0].isdecimal() and words[1].isdecimal():
            size, time_us, ratio = _row(words, path, number)
            if size:
                rows.append((size, time_us))
    if not rows:
        raise InputError("holds no rows of nccl-tests (size, count, type, …, time, algbw, busbw)", source=path)
    if sorted(ranks) != list(range(len(ranks))) or len(ranks) < 2:
        problem = f"{len(ranks)} ranks are listed under `Using devices`; at least 2 are needed to send anything"
        raise InputError(problem, source=path)
    share = 1.0 if name == "sendrecv_perf" else (len(ranks) - 1) / len(ranks)
    if abs(ratio / share - 1.0) > 0.05:
        problem = f"busbw is {ratio:.2f} of algbw, with {name} of {len(ranks)} ranks it is {share:.2f}: another test?"
        raise InputError(problem, source=path)
    hosts, gpus = zip(*(ranks[rank] for rank in range(len(ranks))), strict=True)
    return NcclTable(test=name, hosts=hosts, gpus=gpus, rows=tuple((size * share, us) for size, us in sorted(rows)))


def _test_name(lines: Sequence[str], given: str | None, path: Path) -> str:
    if given is not None and given not in TESTS:
        raise unknown_name(given, TESTS, field="--test")
    found = {name for line in lines for name in re.findall(r"(?<![a-z])([a-z]+(?:_[a-z]+)*_perf)(?![a-z])", line)}
    if other := sorted(found - set(TESTS)):
        raise UnsupportedError(f"{other[0]} is not read; {', '.join(TESTS)} are", source=path)
    if given is not None and found - {given}:
        raise InputError(f"{given!r}, the text says {', '.join(sorted(found))}", source=path, field="--test")
    if len(found) > 1:
        raise InputError(f"holds {' and '.join(sorted(found))}: one test a file", source=path)
    if not found and given is None:
        raise InputError("does not say which test it is: name it with --test", source=path)
    return given or found.pop()


def _rank(text: str, path: Path, number: int) -> int:
    """Return a rank; a number of thousands of digits, which Python does not convert, is none."""
    if len(text) > MOST_RANK_DIGITS:
        raise InputError(f"{shown(text)} is no rank", source=path, field=f"line {number}")
    return int(text)


def _row(words: Sequence[str], path: Path, number: int) -> tuple[float, float, float]:
    """Return a row's size in bytes, its time in microseconds and busbw over algbw, all out of place."""
    field = f"line {number}"
    if len(words) not in WIDTHS:
        raise InputError(f"a row has {WIDTHS[0]} to {WIDTHS[-1]} words, not {len(words)}", source=path, field=field)
    try:
        size, (time_us, algbw, busbw) = float(words[0]), map(float, words[-8:-5])
        wrong = 0.0 if words[-5] == "N/A" else float(words[-5])
    except ValueError as error:
        raise InputError(f"is no row of numbers ({error})", source=path, field=field) from error
    if not (LEAST_US <= time_us < math.inf and 0.0 <= algbw < math.inf and 0.0 <= busbw < math.inf and size < 1e15):
        raise InputError(f"{shown(words[-8])} us, {shown(words[-7])} GB/s cannot be", source=path, field=field)
    if wrong != 0.0:
        raise InputError(f"its results were wrong (#wrong {shown(words[-5])})", source=path, field=field)
    return size, time_us, busbw / algbw if algbw else math.nan


def fit_line(table: NcclTable, path: Path) -> PortLine:
    """Fit latency and bandwidth, neither negative, by least squares of the relative error.

    Raises InputError where there are fewer than three sizes, none fills a port, or times do not grow.
    """
    sent = np.array([size for size, _ in table.rows])
    time_us = np.array([us for _, us in table.rows])
    if len(set(sent)) < FEWEST_SIZES:
        raise InputError(f"has {len(set(sent))} sizes; a line needs {FEWEST_SIZES} (-b 8 -e 256M -f 2)", source=path)
    if sent.max() < BANDWIDTH_FROM_BYTES:
        problem = f"no port carried more than {sent.max():,.0f} bytes; bandwidth shows from {BANDWIDTH_FROM_BYTES:,} on"
        raise InputError(problem, source=path)
    matrix = np.stack([1.0 / time_us, sent / sent.max() / time_us], axis=1)
    (latency_us, whole_us), _ = nnls(matrix, np.ones(len(sent)))
    if whole_us <= 0.0:
        raise InputError("its times do not grow with the size", source=path)
    off = np.abs(matrix @ (latency_us, whole_us) - 1.0)
    return PortLine(
        latency_us=float(latency_us) if sent.min() <= LATENCY_UP_TO_BYTES else None,
        bandwidth_bytes_per_us=float(sent.max() / whole_us),
        sizes=len(set(sent)),
        median_error=float(np.median(off)),
        largest_error=float(off.max()),
    )
