"""A few of the runs of `benchmarks/faults.py`, as it does them: real trainings with a fault planted from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsering.benchmarks.fault_runs.cases import KINDS, Case, drawn
from sparsering.benchmarks.fault_runs.judged import Seen, limit_s, problems

SELECTED = (  # (kind, place, launcher): of the 200 runs of seed 0, the first of each
    ("SIGKILL of a rank", "checkpoint, sealing", "train"),
    ("SIGSTOP of a rank", "backward", "train"),
    ("exception in a rank", "building the model", "train"),
    ("a rank beyond the time-out", "optimizer", "train"),
    ("a signal to the launcher", None, "run"),
    ("two processes as one rank", "start", "by hand"),
    ("a full disk of a rank", "checkpoint, gathering", "train"),
    ("a full disk of all ranks", "checkpoint, writing", "train"),
)


def test_every_kind_is_drawn_and_the_seed_decides() -> None:
    cases = drawn(200, seed=0)
    assert len(cases) == 200 and {case.kind for case in cases} == set(KINDS)
    assert cases == drawn(200, seed=0) != drawn(200, seed=1)
    assert len({case.place for case in cases}) > 15
    assert sum(case.launcher == "train" for case in cases) > 100
    on_gpus = drawn(20, seed=0, gpus=2)
    assert len(on_gpus) == 20 and {case.backend for case in on_gpus} == {"nccl"}


GOOD = Seen(codes={"launcher": 137}, seconds=1.0, fired=True,
            said="sparsering: rank 1 of 2 stopped answering (seen by the launcher); ended by SIGKILL\n")  # fmt: skip
CASE = Case(number=0, kind="SIGKILL of a rank", place="forward", launcher="train", rank=1, ranks=2, steps=2)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"codes": {"launcher": 0}}, "exit code 0"),
        ({"codes": {"launcher": None}}, "it had to be killed"),
        ({"seconds": limit_s(CASE) + 1}, "it took longer than"),
        ({"fired": False}, "the fault never came"),
        ({"said": "sparsering: rank 1 of 2 stopped answering\n"}, "rank or cause not named"),
        ({"said": GOOD.said + "sparsering: rank 0 of 2 stopped answering (seen by rank 1)\n"}, "blamed rank 0"),
        ({"left": ["python"]}, "left running"),
        ({"listening": 1}, "sockets still listen"),
        ({"next_start": "began anew", "next_start_right": False}, "the next start: began anew"),
    ],
)
def test_a_run_is_judged_by_what_was_seen(changes: dict, problem: str | None) -> None:
    found = problems(CASE, Seen(**(vars(GOOD) | changes)))
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("place", "codes", "complete", "wrong"),
    [
        ("leaving", (0, 130), [3, 4], []),
        ("leaving", (0, 130), [3], ["exit code 0"]),  # a step was missing
        ("leaving", (0, 1), [3, 4], ["exit code 0"]),
        ("forward", (0, 130), [3, 4], ["exit code 0"]),
    ],
)
def test_ctrl_c_may_find_ranks_that_have_done_all(place: str, codes: tuple, complete: list, wrong: list) -> None:
    case = Case(number=0, kind="Ctrl-C of ranks started by hand", place=place, launcher="by hand", rank=1, ranks=2,
                steps=2, detail="SIGINT")  # fmt: skip
    seen = Seen(codes={f"rank {rank}": code for rank, code in enumerate(codes)}, seconds=1.0, fired=True, said="",
                complete=complete)  # fmt: skip
    assert problems(case, seen) == wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_selection_of_runs_ends_as_it_must(tmp_path: Path) -> None:
    cases = drawn(200, seed=0)
    numbers = [
        next(one.number for one in cases if (one.kind, one.launcher) == (kind, launcher) and place in (None, one.place))
        for kind, place, launcher in SELECTED
    ]
    command = [sys.executable, "-m", "sparsering.benchmarks.faults", "--runs", "200", "--seed", "0", "--forked-share",
               "1", "--only", *map(str, numbers), "--results", str(tmp_path)]  # fmt: skip
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=False
    )  # fmt: skip
    (path,) = tmp_path.glob("faults-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["number"]: row["problem"] for row in rows} == dict.fromkeys(numbers, "")
    assert ended.returncode == 0, ended.stderr
