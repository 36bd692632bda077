"""SIGTERM, which Slurm, docker and `timeout` send, ends `run` and `train` and every rank that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_cases import case_config, dense_plan
from rank_pool import processes_of
from train_runs import write_run

RANKS = 2


def _commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Return (command, processes that it is made of) of what would go on for hours."""
    dense_plan(case_config("llama"), world_size=RANKS).save(folder / "plan.json")
    write_run(folder / "run", steps=100_000)
    return {
        "run": (["run", str(folder / "plan.json"), "--repeats", "1000000", "--device", "cpu"], 1 + RANKS),
        "train": (["train", str(folder / "run/config.yaml")], 1 + RANKS),
    }


@pytest.mark.examples
@pytest.mark.parametrize("name", ["run", "train"])
def test_sigterm_ends_all_ranks(name: str, tmp_path: Path) -> None:
    command, count = _commands(tmp_path)[name]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "SPARSERING_TEST_RUN": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "sparsering.cli", *command], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as started:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(processes_of(tmp_path)) < count and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(processes_of(tmp_path)) == count
        started.terminate()
        assert started.wait(60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 20
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(tmp_path)
