"""Commands shown in documents: run in a folder that has what they name, or checked as far as they can be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.distributed.run import get_args_parser
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from doc_blocks import rules
from source_files import ROOT
from sparsering import cli
from train_runs import write_model, write_text

# What belongs to others: it is not here, and what it is told is theirs.
FOREIGN = {"nvidia-smi", "sendrecv_perf", "git", "apt-get", "dpkg-deb", "tar", ".venv/bin/pre-commit"}
RUNNER = CliRunner()


def write_what_readers_have(folder: Path) -> None:
    """Write a tiny model, a text and a folder of texts under the names that documents use for a reader's own."""
    model = write_model(folder / "path/to/model", max_position_embeddings=4096)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    write_text(folder / "source-tree", documents=9, bytes_each=2000)
    notes = [path.read_text() for path in sorted((folder / "source-tree").glob("*.txt"))]
    (folder / "notes.txt").write_text("".join(notes))


def run(words: list[str]) -> None:
    """Run one command in the current folder ; it must succeed."""
    if words[0] == "sparsering" and words[1] != "run":  # which starts processes that write to this one's stdout
        done = RUNNER.invoke(cli.app, words[1:])
        assert done.exit_code == 0, f"{words}: {done.output[-2000:]}{done.exception or ''}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{words}: {done.stdout[-1000:]}{done.stderr[-2000:]}"


def check(words: list[str]) -> None:
    """Hold a command that is not run to what is there: verbs, options and values, modules, files, rules, extras."""
    if "&&" in words:
        second = words.index("&&")
        check(words[:second])
        return check(words[second + 1 :])
    program, *arguments = words
    if program == "sparsering":
        check_verb(arguments)
    elif program == "torchrun":
        check_torchrun(arguments)
    elif program == "python":
        check_module(arguments)
    elif program == "make":
        assert set(arguments) <= rules(), words
    elif program == "pytest":
        check_tests(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program.startswith(".ci/"):
        assert os.access(ROOT / program, os.X_OK), program
    else:
        assert program in FOREIGN, f"{program} is not known"


def check_verb(arguments: list[str]) -> None:
    """Read a verb's options as it would, without calling it."""
    assert arguments[0] in cli.VERBS, arguments
    cli._command(arguments[0]).make_context(arguments[0], [*arguments[1:]])


def check_torchrun(arguments: list[str]) -> None:
    """Read torchrun's options, then those of what it starts."""
    given = get_args_parser().parse_args([word for word in arguments if word != "…"])
    rest = list(given.training_script_args)
    if given.training_script == "sparsering.cli":
        check_verb(rest)
    elif given.module:
        assert find_spec(given.training_script) is not None
    else:
        check_options(rest, [ROOT / given.training_script, ROOT / "examples/shared.py"])


def check_module(arguments: list[str]) -> None:
    """Hold the options of `python -m sparsering.…` to those that the module's source names."""
    assert arguments[0] == "-m", arguments
    found = ROOT.joinpath(*arguments[1].split(".")[1:]).with_suffix(".py")
    check_options(arguments[2:], [found, *(ROOT / "benchmarks/lib").glob("*.py")])


def check_options(arguments: list[str], files: list[Path]) -> None:
    """Hold options to the names that sources state."""
    named = {option for path in files for option in re.findall(r'"(--[a-z-]+)"', path.read_text())}
    assert {word for word in arguments if word.startswith("--")} <= named, arguments


def check_tests(arguments: list[str]) -> None:
    """Hold a call of pytest to the markers and folders that are there."""
    markers = [line.partition(":")[0] for line in _pyproject()["tool"]["pytest"]["ini_options"]["markers"]]
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        assert value in markers if name == "-m" else name.startswith("-") or name in markers or (ROOT / name).exists()


def check_pip(arguments: list[str]) -> None:
    """Hold extras to those that there are."""
    extras = set(_pyproject()["project"]["optional-dependencies"])
    assert arguments[0] in ("install", "wheel")
    for word in arguments:
        for listed in re.findall(r"^(?:\.|sparsering)\[(.*)\]$", word):
            assert set(listed.split(",")) <= extras, word


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
