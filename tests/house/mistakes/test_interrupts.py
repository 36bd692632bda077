"""Ctrl-C and SIGTERM while verbs are at work: one line, the right exit code, nothing half-written, nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from interrupts import Command, counts, loaded, started, wrote
from mistakes import TRACE, listing, used
from sparsering.cli import VERBS
from sparsering.planner.plan import load_plan
from sparsering.traces.timeline import Timeline
from train_runs import write_run

pytestmark = pytest.mark.slow
Sign = Callable[[Command], bool]
CAPTURE = "capture --model run/model --random-weights --text long.txt -o out --seq-len 16384 --columns 64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files, some of them so large that whoever reads them takes seconds."""
    folder, before = tmp_path_factory.mktemp("interrupts"), Path.cwd()
    os.chdir(folder)
    try:
        used(f"synthesize vertical-slash -o trace {TRACE}")
        used(f"synthesize vertical-slash -o deep {TRACE} --layers 300")
        used("plan --trace trace --cluster local-cpu-4 -o plan.json --backend blockwise --dtype float32 "
             "--evaluator recurrence")  # fmt: skip
        used("simulate plan.json --cluster local-cpu-4 -o timeline.json.gz")
        write_run(folder / "run", steps=100000, metrics={"folder": str(folder / "run" / "metrics")})
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "run" / "model"))
        model.save_pretrained(folder / "run" / "weights")
        (folder / "long.txt").write_text("ring plan token block mask\n" * 1000)
        (folder / "many.jsonl").write_text('{"text": "some text"}\n' * 20_000)
        _write_large_files(folder)
    finally:
        os.chdir(before)
    return folder


def _write_large_files(folder: Path) -> None:
    """Write a cluster, a timeline, a plan and a text as large as they may be, or nearly so."""
    lines = "".join(f"  - {{m: {number}, n: [1, 2, 3, 4]}}\n" for number in range(25_000))
    (folder / "large.yaml").write_text(f"unknown:\n{lines}")
    timeline = Timeline.load(folder / "timeline.json.gz")
    replace(timeline, spans=timeline.spans * (200_000 // len(timeline.spans))).save(folder / "large-timeline.json")
    plan = load_plan(folder / "plan.json")
    plan.with_record(provenance={"steps": list(range(2_000_000))}).save(folder / "large-plan.json")
    (folder / "large.txt").write_text("GPU0 is a line of a legend, and no row of a matrix\n" * 300_000)


def _contents(folder: Path) -> dict[str, str]:
    """The listing without a training run's metrics."""
    return {name: digest for name, digest in listing(folder).items() if "metrics" not in name}


STARTED = loaded("_multiarray_umath")  # of numpy, which every verb imports before it reads a file
TELLING = ("demo", "train", "run")  # run warns of more ranks than cores
CASES: dict[str, tuple[str, Callable[[Path], Sign]]] = {
    "synthesize": (
        "synthesize vertical-slash -o out --layers 64 --seq-len 262144",
        lambda f: wrote(f, "out/manifest.json"),
    ),
    "inspect": ("inspect deep", lambda f: loaded("libarrow")),
    "plan": ("plan --trace trace --cluster large.yaml -o plan.json", lambda f: STARTED),
    "check": ("check large-plan.json", lambda f: STARTED),
    "simulate": ("simulate plan.json --cluster large.yaml -o timeline.json.gz", lambda f: STARTED),
    "compare": ("compare timeline.json.gz large-timeline.json", lambda f: STARTED),
    "validate": ("validate timeline.json.gz large-timeline.json", lambda f: STARTED),
    "cluster": (
        "cluster --base local-cpu-4 --topology large.txt -o cluster.yaml",
        lambda f: STARTED,
    ),
    "export": ("export large-timeline.json -o out", lambda f: STARTED),
    "report": ("report deep timeline.json.gz -o page.html", lambda f: loaded("libarrow")),
    "estimate": ("estimate run/config.yaml --cluster large.yaml", lambda f: loaded("libtorch_cpu")),
    "doctor": ("doctor", lambda f: loaded("libtorch_cpu")),
    "data": ("data many.jsonl -o out --shard-tokens 1", lambda f: wrote(f, ".out*/tokens-00001.bin")),
    "capture": (CAPTURE, lambda f: wrote(f, "out/manifest.json")),
    "eval": (
        "eval --model run/weights --data run/data --seq-len 4096 --sequences 1 -o out.json",
        lambda f: loaded("libtorch_cpu"),
    ),
    "audit": ("audit run/model --fresh", lambda f: loaded("libtorch_cpu")),
    "demo": ("demo -o out", lambda f: wrote(f, ".out.*.partial")),
    "run": ("run plan.json -o timeline.json.gz --repeats 100000", lambda f: counts(5)),
    "train": ("train run/config.yaml", lambda f: wrote(f, "run/metrics/*")),
}


def test_every_verb_is_interrupted_somewhere():
    assert {*CASES, "calibrate"} == set(VERBS)


@pytest.mark.parametrize("verb", CASES)
def test_ctrl_c_is_one_line_and_leaves_nothing(folder: Path, verb: str):
    arguments, sign = CASES[verb]
    before = _contents(folder)
    with started(arguments, folder) as command:
        command.wait_for(sign(folder))
        command.interrupt()
        code, stdout, stderr = command.end()
        assert command.processes() == []
    lines = stderr.splitlines()  # demo and train have told of their progress before
    assert lines[-1] == "sparsering: interrupted"
    assert [line for line in lines if line.startswith("sparsering: ")] == lines[-1:]
    assert "Traceback" not in stderr
    assert verb in TELLING or len(lines) == 1
    # A shell shows both as 130: code that C of a library was running in Python makes Python end itself by the signal.
    assert code in (130, -signal.SIGINT)
    assert stdout == ""
    assert _contents(folder) == before


# Sends Ctrl-C at the moment when the command line's first library is looked for.
WHILE_IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from sparsering.__main__ import main
main()
"""


def test_ctrl_c_while_the_command_line_is_imported():
    ended = subprocess.run([sys.executable, "-c", WHILE_IMPORTING], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "sparsering: interrupted\n")


def test_a_calibration_keeps_its_points_only(folder: Path):
    arguments = "calibrate -o new.yaml --cluster local-cpu-4 --backend blockwise --heads 2:1 --head-dim 16"
    with started(arguments, folder) as command:
        command.wait_for(wrote(folder, "new.points.json"))
        command.interrupt()
        code, _, stderr = command.end()
    (folder / "new.points.json").unlink()
    assert (code, stderr) == (130, "sparsering: interrupted\n")
    assert not list(folder.glob("*new*"))


@pytest.mark.parametrize("verb", ["run", "train"])
def test_sigterm_ends_all_ranks(folder: Path, verb: str):
    arguments, sign = CASES[verb]
    for left in (folder / "run").glob("metrics/*"):
        left.unlink()
    with started(arguments, folder) as command:
        command.wait_for(sign(folder))
        command.process.send_signal(signal.SIGTERM)
        code, _, stderr = command.end()
        assert command.processes() == []
    assert code == 143
    assert "Traceback" not in stderr
