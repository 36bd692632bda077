"""Every fenced block of the documents is run as printed, or says why not and is then held to what is there.

Commands of a page run in order, in one folder that holds nothing but a small model and texts, under the names that
pages use for a reader's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from doc_blocks import WRITTEN, Block, all_blocks, blocks_of, rules
from doc_commands import check, run, write_what_readers_have
from source_files import ROOT, document_id
from sparsering import cli
from sparsering.traces.errors import InputError

BLOCKS = all_blocks()
CONSOLE = [block for block in BLOCKS if block.language == "console"]
RUN = [block for block in CONSOLE if block.not_run is None]
UNRUN = [block for block in BLOCKS if block.not_run is not None]


def pages() -> Iterator[ParameterSet]:
    """Yield the documents with commands; those that start ranks belong to `make test-examples`."""
    for document in WRITTEN:
        verbs = {words[1] for block in RUN if block.document == document for words in block.commands()}
        if verbs:
            mark = pytest.mark.examples if "run" in verbs else pytest.mark.slow
            yield pytest.param(document, marks=mark, id=document_id(document))


# What is neither run here nor excused above its block: which test runs it.
ELSEWHERE = {
    "README.md python": "test_readme.py, under torchrun, beside the model alone",
    "docs/extending.md python": "test_a_small_script_adds_a_layout_to_the_verbs",
}
# Reason -> in which documents, and how many blocks.
NOT_RUN: dict[str, dict[str, int]] = {
    "continuous integration runs these; they take up to half an hour": {"CONTRIBUTING.md": 1},
    "downloads hundreds of megabytes": {"docs/guides/long-text.md": 1},
    "installs into the environment that runs it": {"docs/ecosystem.md": 1, "docs/quickstart.md": 1, "README.md": 1},
    "minutes; tests/runtime/demo runs the demo itself": {"README.md": 1, "docs/quickstart.md": 1},
    "needs a GGUF file": {"docs/guides/long-text.md": 1},
    "needs HolisticTraceAnalysis": {"docs/ecosystem.md": 1},
    "needs GPUs and nccl-tests; tests/planner/importing reads such texts": {"docs/file-formats.md": 1},
    "needs a GPU": {"docs/kernels.md": 1, "docs/predictions.md": 1},
    "needs a result file of a benchmark; tests/simulator validates some": {"docs/file-formats.md": 1},
    "needs eight GPUs": {"docs/measured/README.md": 1},
    "needs GPUs for hours; tests/benchmarks/test_bench_learning.py runs a small study": {"docs/learning.md": 1},
    "needs two nodes of eight GPUs": {"docs/guides/run.md": 1},
    "shows a call; tests/runtime/evaluate makes it": {"docs/evaluation.md": 1},
    "tests/house/test_examples.py runs the scripts, beside the model alone": {"examples/README.md": 4},
    "tests/runtime/train/estimate/test_recipes.py does, and looks at the figures": {"examples/README.md": 1},
    "trains for as long as the configuration says; tests/runtime/train does": {"docs/training.md": 1},
}


@pytest.mark.parametrize("page", list(pages()))
def test_commands_of_a_page_run_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_what_readers_have(tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in RUN:
        if block.document == page:
            assert block.output() == [], "what commands print changes: say in words what to look for"
            assert block.commands(), f"{block.place} has no command"
            for words in block.commands():
                run(words)


@pytest.mark.parametrize("block", UNRUN, ids=lambda block: block.place)
def test_commands_that_are_not_run_could_be(block: Block) -> None:
    if block.language == "python":
        compile(block.text, block.place, "exec")
        return
    assert block.output() == [] and block.commands(), block.place
    for words in block.commands():
        check(words)


def test_what_is_not_run_is_listed_with_its_reason() -> None:
    counted: dict[str, dict[str, int]] = {}
    for block in UNRUN:
        of_reason = counted.setdefault(str(block.not_run), {})
        of_reason[document_id(block.document)] = of_reason.get(document_id(block.document), 0) + 1
    assert counted == NOT_RUN


def test_every_block_is_run_shown_from_a_file_or_excused() -> None:
    """YAML is exercised by test_docs.py, files shown whole are held to the files by test_doc_pages.py."""
    left = []
    for block in BLOCKS:
        if block.language in ("console", "yaml") or block.not_run is not None:
            continue
        if block.language == "python" and block.shows is not None:
            assert (block.document.parent / block.shows).is_file()
        elif block.language == "text":
            assert not block.commands(), f"{block.place}: commands belong into a console block"
        else:
            left.append(f"{document_id(block.document)} {block.language}")
    assert sorted(left) == sorted(ELSEWHERE)


def test_a_small_script_adds_a_layout_to_the_verbs(tmp_path: Path) -> None:
    (script,) = [block for block in blocks_of(ROOT / "docs/extending.md") if block.shows is None]
    (tmp_path / "verbs.py").write_text(script.text)
    (tmp_path / "my_layout.py").write_text((ROOT / "tests/support/schedules/new_layout.py").read_text())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "verbs.py", "plan", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "direct" in done.stdout, done.stdout + done.stderr


def test_fences_are_found_wherever_they_stand() -> None:
    console = "```console\n$ a \\\n  b # c\n```\n- x\n\n  <!-- not run: hours -->\n  ```console\n  $ d 'e f'\n  ```\n"
    text = f"{console}~~~yaml\na: 1\n~~~\n"
    first, second, third = blocks_of(ROOT / "README.md", text)
    assert (first.commands(), first.not_run, first.output()) == ([["a", "b"]], None, [])
    assert (second.commands(), second.not_run) == ([["d", "e f"]], "hours")
    assert (third.language, third.text) == ("yaml", "a: 1\n")
    fences = sum(line.lstrip().startswith(("```", "~~~")) for path in WRITTEN for line in path.read_text().splitlines())
    assert fences == 2 * len(BLOCKS)


@pytest.mark.parametrize(
    "words",
    [
        ["sparsering", "plan", "--trase", "trace/", "--cluster", "h100-nvlink-8"],
        ["sparsering", "plam"],
        ["torchrun", "--nproc-per-node", "2", "-m", "sparsering.cli", "run", "plan.json", "--tracee", "trace/"],
        ["python", "-m", "sparsering.benchmarks.ring", "--gpu", "8"],
        ["make", "tests"],
        ["pip", "install", ".[gpus]"],
        ["pytest", "-m", "gpus"],
        ["sparserings", "plan"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_would_be_noticed(words: list[str]) -> None:
    with pytest.raises((AssertionError, InputError, SystemExit, cli.USAGE_ERROR)):
        check(words)


def test_the_readme_is_short_and_says_how_to_begin() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert {"demo", "site"} <= rules()
