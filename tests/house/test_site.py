"""The site's pages: generated parts are current, every page is in the navigation, worked numbers are right."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import pytest

import sparsering
from source_files import ROOT, between, load_script
from sparsering.runtime.train.config import TrainConfig

DOCS = ROOT / "docs"
READERS_OF_THE_ENVIRONMENT = ("cli.py", "runtime/comm/mesh.py")
BY_TORCHS_RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "RANK", "WORLD_SIZE"}
BY_PROCESSES_WE_START = {"OMP_NUM_THREADS"}


@pytest.mark.parametrize("name", ["write_settings", "write_support", "write_worked_mask"])
def test_generated_parts_are_current(name: str) -> None:
    script = load_script(name)
    assert between(script.PAGE.read_text(), script.BEGIN, script.END) == script.rendered(), "`make docs` rewrites it"


def test_the_worked_mask_is_what_the_page_counts_by_hand() -> None:
    script = load_script("write_worked_mask")
    assert script.FIGURE.read_text() == script.drawing(), "`make docs` rewrites it"
    text = " ".join(script.PAGE.read_text().split())
    assert script.mask().density == 19 / 36
    assert script.tokens_attended_by_column() == 16
    found = {name: script.worked(placement) for name, placement in script.placements().items()}
    assert [found["striped"].pairs_of(rank)[:2] for rank in range(4)] == [[3, 1], [3, 2], [3, 2], [3, 2]]
    assert [sum(found["contiguous"].pairs_of(rank)) for rank in range(4)] == [3, 4, 6, 6]
    assert found["striped"].metrics.worker_imbalance == found["striped"].metrics.step_imbalance == 5 / 4.75
    assert (found["striped"].metrics.makespan_us, found["contiguous"].metrics.makespan_us) == (7, 12)
    quick = script.worked(script.placements()["striped"], bandwidth_bytes_per_us=8000.0)
    assert quick.metrics.makespan_us == 5
    for said in ("19 of the 36 causal blocks: a *density* of 53 %", "16 (query, key) pairs", "5 ÷ 4.75 = 1.05",
                 "computes for 2 µs: 7 µs", "compute 2 more: 12 µs", "hides behind phase 0: 5 µs"):  # fmt: skip
        assert said in text


def test_every_key_of_a_configuration_has_a_row() -> None:
    script = load_script("write_settings")
    rows = set(re.findall(r"^\| `([\w.]+)` \|", script.rendered(), re.MULTILINE))
    keys = set(TrainConfig.model_fields) - {name for name, _, _ in script.sections(TrainConfig)}
    nested = {name for name, _, _ in script.sections(TrainConfig)}
    assert keys <= rows and all(any(row.startswith(f"{name}.") for row in rows) for name in nested)
    assert "| `optimizer.learning_rate` | number, > 0 | `0.0003` |" in script.rendered()


def test_environment_variables_that_are_read_are_listed() -> None:
    page = between((DOCS / "settings.md").read_text(), "<!-- environment: begin -->", "<!-- environment: end -->")
    listed = {name for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    read = {name for path in READERS_OF_THE_ENVIRONMENT for name in names_read((ROOT / path).read_text())}
    assert read <= listed, "docs/settings.md lists what is read"
    assert listed <= read | BY_TORCHS_RENDEZVOUS | BY_PROCESSES_WE_START


def names_read(source: str) -> set[str]:
    """Return the names that a file asks `os.environ` for, one way or another."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        asked = [node.args[0]] if isinstance(node, ast.Call) and node.args else []
        if isinstance(node, ast.Compare):
            asked = [node.left]
        elif isinstance(node, ast.Subscript):
            asked = [node.slice]
        text = ast.unparse(node) if asked else ""
        if "os.environ" in text or "getenv" in text:
            found |= {one.value for one in asked if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return found


def test_the_python_page_has_the_whole_public_face() -> None:
    shown = re.findall(r"^::: sparsering\.([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {path.rpartition(".")[2] for path in shown} == {*sparsering._HOMES, "plan_trace"}
    for module, _, name in (path.rpartition(".") for path in shown):
        home = import_module(f"sparsering.{module}") if module else sparsering
        assert getattr(home, name) is getattr(sparsering, name)


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w./-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_glossary_has_the_words_that_pages_use() -> None:
    rows = re.findall(r"^\| (.*?) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    words = " ".join(rows).replace("*", "").lower()
    wanted = ("block", "pattern", "trace", "placement", "shard", "schedule", "phase", "plan", "cluster", "calibration",
              "timeline", "tile", "density", "worker imbalance", "step imbalance", "kept mass", "exposed", "columns",
              "landed gradient", "diagonals", "selector", "layout", "backend", "lower bound", "rank")  # fmt: skip
    assert [word for word in wanted if word not in words] == []
    assert len(rows) == len(set(rows))
