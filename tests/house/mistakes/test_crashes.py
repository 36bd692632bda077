"""kill -9 and a full disk while verbs write: what exists is whole, and the same command goes on or begins anew.

A limit on the size of files stands for the full disk: a write fails in the same place, with another error number.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from interrupts import started
from mistakes import PLAN, TRACE, assert_one_line, listing, used
from train_runs import write_run

KILLS = {"slow": 2, "soak": int(os.environ.get("SOAK_KILLS", "100"))}  # of every verb
PARTS = int(os.environ.get("SOAK_PARTS", "1"))  # of a verb's kills: more than one where many processors share them
PLANNED = PLAN.replace("--evaluator recurrence", "")


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A command line that writes.

    output: its file or folder; valid: a command line that exits with 0 where the output is whole; once: it refuses an
    output that is there, whole; alike: two runs write the same bytes (a plan names the seconds that it took).
    """

    arguments: str
    output: str
    valid: str = ""
    once: bool = False
    alike: bool = True


VERBS = {
    "synthesize": Writing(
        arguments="synthesize moba-block -o out --layers 6 --seq-len 65536", output="out", valid="inspect out"
    ),
    "capture": Writing(
        arguments="capture --model run/model --random-weights --text long.txt -o out --seq-len 1024 --steps 3 "
        "--columns 16",
        output="out", valid="inspect out",
    ),
    "plan": Writing(
        arguments=f"plan --trace trace -o out.json {PLANNED}", output="out.json", valid="check out.json", alike=False
    ),
    "simulate": Writing(
        arguments="simulate plan.json --cluster local-cpu-4 -o out.json.gz", output="out.json.gz",
        valid="compare out.json.gz out.json.gz",
    ),
    "data": Writing(
        arguments="data texts -o out", output="out", once=True,
        valid="train run/config.yaml --dry-run --set data.folder=../out",
    ),
    "export": Writing(arguments="export timeline.json.gz -o out", output="out", once=True),
    "report": Writing(arguments="report trace plan.json timeline.json.gz -o out.html", output="out.html"),
}  # fmt: skip
MINUTE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
FULL_BYTES = (10, 1000, 20000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files to work on."""
    folder, before = tmp_path_factory.mktemp("crashes"), Path.cwd()
    os.chdir(folder)
    try:
        used(f"synthesize vertical-slash -o trace {TRACE}")
        used(f"plan --trace trace {PLAN} -o plan.json")
        used("simulate plan.json --cluster local-cpu-4 -o timeline.json.gz")
        write_run(folder / "run")
        (folder / "long.txt").write_text("ring plan token block mask\n" * 1000)
        (folder / "texts").mkdir()
        for number in range(200):
            (folder / "texts" / f"{number}.txt").write_text(f"some text {number}\n" * 2000)
    finally:
        os.chdir(before)
    return folder


def _run(arguments: str, folder: Path, *, most_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line; most_bytes: no file may become larger."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes or 0, most_bytes or 0))

    command = [sys.executable, "-m", "sparsering", *arguments.split()]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        preexec_fn=None if most_bytes is None else limit,
    )  # fmt: skip


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _contents(path: Path) -> object:
    """Return what is in a file or folder, without the minute that a report was made in."""
    return listing(path) if path.is_dir() else MINUTE.sub(b"", path.read_bytes())


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".partial" in path.name)


def _kill_and_go_on(folder: Path, verb: str, kills: int, *, part: int = 0) -> None:
    """Kill a verb at random moments of its work; after each, look at what is there and run it again to its end.

    folder: what the verb needs, where nothing else works; part: other moments for another number.
    """
    writing, moments = VERBS[verb], random.Random(f"{verb} {part}")
    output = folder / writing.output
    began = time.monotonic()
    assert _run(writing.arguments, folder).returncode == 0
    seconds, wanted = time.monotonic() - began, _contents(output)
    assert not writing.valid or _run(writing.valid, folder).returncode == 0
    _remove(output)
    for _ in range(kills):
        with started(writing.arguments, folder) as command:
            time.sleep(moments.uniform(0.2, 1.0) * seconds)
            os.killpg(command.process.pid, signal.SIGKILL)
            command.end()
        if output.exists() and writing.valid:
            seen = _run(writing.valid, folder)
            assert seen.returncode == 0 or (output.is_dir() and "no training step" in seen.stderr), seen.stderr
        again = _run(writing.arguments, folder)
        if writing.once and output.exists() and again.returncode:  # it had ended before it was killed
            assert_one_line(again.stderr, ["is not empty"])
        else:
            assert again.returncode == 0, again.stderr
        if writing.alike:
            assert _contents(output) == wanted  # which is valid
        else:
            assert not writing.valid or _run(writing.valid, folder).returncode == 0
        assert _left(folder) == []
        _remove(output)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_goes_on_or_begins_anew(folder: Path, verb: str) -> None:
    _kill_and_go_on(folder, verb, KILLS["slow"])


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_verb_may_be_killed_at_any_moment(folder: Path, part: int, verb: str) -> None:
    first, end = (KILLS["soak"] * one // PARTS for one in (part, part + 1))
    _kill_and_go_on(folder, verb, end - first, part=part)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path, verb: str) -> None:
    writing, before = VERBS[verb], listing(folder)
    for most_bytes in FULL_BYTES:
        ended = _run(writing.arguments, folder, most_bytes=most_bytes)
        if ended.returncode == 0:  # it needs less
            _remove(folder / writing.output)
        else:
            assert ended.returncode == 2
            assert_one_line(ended.stderr, ["File too large"])
        assert listing(folder) == before
