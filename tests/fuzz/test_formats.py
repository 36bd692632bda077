"""Files of others, changed in hostile ways: each is read or refused by an InputError in one line, and nothing else.

Some inputs of every format in each run of the tests, 300 in `make test-slow`, 50,000 in `make soak`, where
a process that takes a gigabyte more than it has, or an input that takes long, fails as well.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from formats import LAPTOP, Format
from mutations import as_json, mutated, spoilt
from sparsering.traces.errors import CONTROL, InputError

if find_spec("torch") is not None:
    from torch_formats import FULL
else:
    FULL: list[Format] = []  # a laptop's installation

FORMATS = {one.name: one for one in [*LAPTOP, *FULL]}
STRUCTURED = [name for name, one in FORMATS.items() if one.document is not None]
FEW, MANY, SOAK = 20, 300, int(os.environ.get("SOAK_EXAMPLES", "50000"))
GIB = 1 << 30
LONGEST = timedelta(seconds=30)  # a hang, where a usual input takes milliseconds
NO_CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
Fuzz = Callable[[Format, Path, int], None]


def refused_or_read(format: Format, path: Path) -> None:
    """Read a changed file; fail unless it is read, or refused in one line that no terminal obeys."""
    try:
        format.read(path)
    except InputError as error:
        told = str(error)
        assert told and "\n" not in told and not CONTROL.search(told), repr(told)
        assert len(told) < 2000, "too long to be read"


def change_values(format: Format, path: Path, examples: int) -> None:
    """Change an example's values, and let its digests fit."""
    assert format.document is not None and format.write is not None
    document, write = format.document(path), format.write
    others = {one: one.read_bytes() for one in path.parent.rglob("*") if one.is_file()}

    @settings(max_examples=examples, deadline=None if examples < SOAK else LONGEST,
              suppress_health_check=NO_CHECKS, database=None)  # fmt: skip
    @given(mutated(document))
    def judge(changed: object) -> None:
        for one, data in others.items():
            one.write_bytes(data)
        write(path, changed)
        refused_or_read(format, path)

    judge()


def change_bytes(format: Format, path: Path, examples: int) -> None:
    """Change an example's bytes, whatever its digests say."""
    good = path.read_bytes()

    @settings(max_examples=examples, deadline=None if examples < SOAK else LONGEST,
              suppress_health_check=NO_CHECKS, database=None)  # fmt: skip
    @given(spoilt(good))
    def judge(changed: bytes) -> None:
        path.write_bytes(changed)
        refused_or_read(format, path)

    judge()


CASES = [(name, change_values) for name in STRUCTURED] + [(name, change_bytes) for name in FORMATS]
every_case = pytest.mark.parametrize(("name", "fuzz"), CASES, ids=[f"{name}-{fuzz.__name__}" for name, fuzz in CASES])


@every_case
def test_a_few(name: str, fuzz: Fuzz, tmp_path: Path) -> None:
    fuzz(FORMATS[name], FORMATS[name].make(tmp_path), FEW)


@pytest.mark.slow
@every_case
def test_many(name: str, fuzz: Fuzz, tmp_path: Path) -> None:
    fuzz(FORMATS[name], FORMATS[name].make(tmp_path), MANY)


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


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
@every_case
def test_soak(name: str, fuzz: Fuzz, tmp_path: Path) -> None:
    path = FORMATS[name].make(tmp_path)
    FORMATS[name].read(path)  # what it loads does not count
    with one_more_gibibyte():
        fuzz(FORMATS[name], path, SOAK)


@every_case
def test_the_examples_are_good(name: str, fuzz: Fuzz, tmp_path: Path) -> None:
    """Else nothing behind the first check would be reached; and writing one back unchanged leaves it good."""
    format = FORMATS[name]
    path = format.make(tmp_path)
    if fuzz is change_values:
        assert format.document is not None and format.write is not None
        format.write(path, format.document(path))
    format.read(path)


def test_changes_can_say_what_json_alone_cannot() -> None:
    assert as_json({"a": 1, "\0twice:a": float("nan")}) == b'{"a": 1, "a": NaN}'
