"""Lower bounds of dependencies: what .ci/lowest tries is what pyproject.toml admits."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from source_files import ROOT


def _requirements(lines: list[str], operator: str) -> dict[str, Version]:
    """Return the version that each requirement names with this operator, its only one."""
    found = [Requirement(line) for line in lines]
    specifiers = {canonicalize_name(one.name): list(one.specifier) for one in found}
    assert all([one.operator for one in each] == [operator] for each in specifiers.values())
    return {name: Version(each[0].version) for name, each in specifiers.items()}


def _lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _core() -> dict[str, Version]:
    return _requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"], ">=")


def test_the_lowest_versions_that_are_tried_are_the_bounds() -> None:
    assert _requirements(_lines("lowest.txt"), "==") == _core()


def test_the_lock_holds_versions_alone_and_none_below_a_bound() -> None:
    locked = _requirements(_lines("development.lock"), "==")
    assert {name for name, lowest in _core().items() if locked[name] < lowest} == set()
