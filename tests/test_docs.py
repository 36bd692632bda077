"""The documents say what is there: the map names every file, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsering import cli

ROOT = Path(__file__).resolve().parent.parent
HOUSES = ("traces", "planner", "simulator", "kernels", "runtime")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_map_names_every_file_and_no_other():
    on_disk = {path.relative_to(ROOT).as_posix() for house in HOUSES for path in (ROOT / house).rglob("*.py")}
    on_disk = {path for path in on_disk if not path.endswith("__init__.py")}
    listed = re.findall(r"^- `([\w/]+\.py)`: \S", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(on_disk), "`make map` rewrites it"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(document: Path):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_shown_exist(document: Path):
    shown = re.findall(r"^\$ (?:torchrun .* sparsering\.cli|sparsering) (\w+)", document.read_text(), re.MULTILINE)
    assert set(shown) <= set(cli.VERBS)
    targets = re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"^\$ .*", document.read_text(), re.MULTILINE)))
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) <= set(rules)
