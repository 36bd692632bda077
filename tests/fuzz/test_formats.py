"""Files of others, changed in hostile ways: each is read or refused by an InputError in one line, and nothing else.

Some inputs of every format in each run of the tests, 300 in `make test-slow`, 50,000 in `make soak`, where
a process that takes a gigabyte more than it has, or an input that takes long, fails as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import LAPTOP, Format
from many_inputs import changed_bytes, changed_values, many, refused_or_read
from mutations import as_json, left_out, named_places, nulled

if find_spec("torch") is not None:
    from torch_formats import FULL
else:
    FULL: list[Format] = []  # a laptop's installation

FORMATS = {one.name: one for one in [*LAPTOP, *FULL]}
STRUCTURED = [name for name, one in FORMATS.items() if one.document is not None]
FEW, MANY, SOAK = 20, 300, int(os.environ.get("SOAK_EXAMPLES", "50000"))
PARTS = int(os.environ.get("SOAK_PARTS", "1"))  # of a format's inputs: more than one where many processors share them
NO_CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
Fuzz = Callable[[Format, Path, int], None]


def change_values(format: Format, path: Path, examples: int) -> None:
    """Change an example's values, and let its digests fit."""
    changes = changed_values(format, path)

    @settings(max_examples=examples, deadline=None, suppress_health_check=NO_CHECKS, database=None)
    @given(st.randoms(use_true_random=False))
    def judge(dice: Random) -> None:
        changes(dice)
        refused_or_read(format, path)

    judge()


def change_bytes(format: Format, path: Path, examples: int) -> None:
    """Change an example's bytes, whatever its digests say."""
    changes = changed_bytes(format, path)

    @settings(max_examples=examples, deadline=None, suppress_health_check=NO_CHECKS, database=None)
    @given(st.randoms(use_true_random=False))
    def judge(dice: Random) -> None:
        changes(dice)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURED)
def test_without_any_one_value(name: str, tmp_path: Path) -> None:
    """Each named value left out, and each in turn null: of lists the first and the last are looked into."""
    format = FORMATS[name]
    path = format.make(tmp_path)
    assert format.document is not None and format.write is not None
    document = format.document(path)
    for place in [one for one in named_places(document) if one]:
        for change in (left_out, nulled):
            format.write(path, change(document, place))
            refused_or_read(format, path)


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
@every_case
@pytest.mark.parametrize("part", range(PARTS))
def test_soak(part: int, name: str, fuzz: Fuzz, tmp_path: Path) -> None:
    """Twice as many as asked for of a format that has values and bytes: so many of each."""
    format = FORMATS[name]
    path = format.make(tmp_path)
    format.read(path)  # what it loads does not count
    changes = (changed_values if fuzz is change_values else changed_bytes)(format, path)
    first, end = (SOAK * one // PARTS for one in (part, part + 1))
    assert many(format, path, changes, end - first, first=first) == []


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
