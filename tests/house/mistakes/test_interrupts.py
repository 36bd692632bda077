"""Ctrl-C and SIGTERM while verbs are at work: one line, the right exit code, nothing half-written, nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from interrupts import Command, counts, loaded, reads, started, wrote
from mistakes import TRACE, listing, used
from sparsering.cli import VERBS
from train_runs import write_run

pytestmark = pytest.mark.slow
Sign = Callable[[Command], bool]
CAPTURE = "capture --model run/model --random-weights --text long.txt -o out --seq-len 16384 --columns 64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files, and a named pipe that whoever reads it waits for."""
    folder, before = tmp_path_factory.mktemp("interrupts"), Path.cwd()
    os.chdir(folder)
    try:
        used(f"synthesize vertical-slash -o trace {TRACE}")
        used(f"synthesize vertical-slash -o deep {TRACE} --layers 300")
        used("plan --trace trace --cluster local-cpu-4 -o plan.json --backend blockwise --dtype float32 "
             "--evaluator recurrence")  # fmt: skip
        used("simulate plan.json --cluster local-cpu-4 -o timeline.json.gz")
        write_run(folder / "run", steps=100000, metrics={"folder": str(folder / "run" / "metrics")})
        (folder / "long.txt").write_text("ring plan token block mask\n" * 1000)
        (folder / "texts").mkdir()
        (folder / "texts" / "0.txt").write_text("some text\n")
        os.mkfifo(folder / "texts" / "1.txt")
        os.mkfifo(folder / "pipe.json")
        os.mkfifo(folder / "pipe.yaml")
    finally:
        os.chdir(before)
    return folder


def _contents(folder: Path) -> dict[str, str]:
    """The listing without pipes, which nobody can read to the end, and without a training run's metrics."""
    kept = folder.parent / "pipes"
    kept.mkdir(exist_ok=True)
    pipes = [path for path in folder.rglob("*") if path.is_fifo()]
    moved = [(path, kept / str(number)) for number, path in enumerate(pipes)]
    for path, place in moved:
        path.rename(place)
    try:
        return {name: digest for name, digest in listing(folder).items() if "metrics" not in name}
    finally:
        for path, place in moved:
            place.rename(path)


TELLING = ("demo", "train", "run")  # run warns of more ranks than cores
CASES: dict[str, tuple[str, Callable[[Path], Sign]]] = {
    "synthesize": (
        "synthesize vertical-slash -o out --layers 64 --seq-len 262144",
        lambda f: wrote(f, "out/manifest.json"),
    ),
    "inspect": ("inspect deep", lambda f: loaded("libarrow")),
    "plan": ("plan --trace trace --cluster pipe.yaml -o plan.json", lambda f: reads(f / "pipe.yaml")),
    "check": ("check pipe.json", lambda f: reads(f / "pipe.json")),
    "simulate": ("simulate plan.json --cluster pipe.yaml -o timeline.json.gz", lambda f: reads(f / "pipe.yaml")),
    "compare": ("compare timeline.json.gz pipe.json", lambda f: reads(f / "pipe.json")),
    "validate": ("validate timeline.json.gz pipe.json", lambda f: reads(f / "pipe.json")),
    "cluster": (
        "cluster --base local-cpu-4 --topology pipe.json -o cluster.yaml",
        lambda f: reads(f / "pipe.json"),
    ),
    "export": ("export pipe.json -o out", lambda f: reads(f / "pipe.json")),
    "report": ("report deep timeline.json.gz -o page.html", lambda f: loaded("libarrow")),
    "estimate": ("estimate run/config.yaml --cluster pipe.yaml", lambda f: reads(f / "pipe.yaml")),
    "doctor": ("doctor", lambda f: loaded("libtorch_cpu")),
    "data": ("data texts -o out --shard-tokens 1", lambda f: reads(f / "texts" / "1.txt")),
    "capture": (CAPTURE, lambda f: wrote(f, "out/manifest.json")),
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
    assert (code, stdout) == (130, "")
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
