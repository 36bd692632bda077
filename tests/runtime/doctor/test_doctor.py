"""`sparsering doctor`: on this machine, with GPUs that a program called nvidia-smi tells of, and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsering.cli import VERBS, app
from sparsering.runtime.doctor.gpus import find_gpus
from tool_texts import topology

ROWS = "\n".join(f"{number}, NVIDIA H100 80GB HBM3, 81559, 9.0, 570.133.20" for number in range(8))
TABLE = "| NVIDIA-SMI 570.133.20             Driver Version: 570.133.20     CUDA Version: 12.8     |"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)
on_cpu = pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch that is built for CPUs")


def put_nvidia_smi(folder: Path, patch: pytest.MonkeyPatch, *, rows: str, matrix: str, exit_code: int = 0) -> None:
    """Put a program called nvidia-smi first on PATH, which prints these texts."""
    folder.mkdir()
    for name, text in (("rows", rows), ("matrix", matrix), ("table", TABLE)):
        (folder / name).write_text(text + "\n")
    program = folder / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in --query-gpu=*) cat {folder}/rows;; topo) cat {folder}/matrix;; '
        f"*) cat {folder}/table;; esac\nexit {exit_code}\n"
    )
    program.chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def doctor(exit_code: int) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@on_cpu
def test_here_every_verb_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvidia_smi(tmp_path, monkeypatch)
    found = doctor(0)
    assert found["verbs"] == dict.fromkeys(VERBS, "works")
    assert found["verdict"] == "Every verb works here, without a GPU."
    states = {name: verdict["state"] for name, verdict in found["torch"]["backends"].items()}
    assert (states["reference"], states["blockwise"]) == ("works", "works")
    assert found["torch"]["version"] == torch.__version__ == found["versions"]["torch"]
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert (found["missing"], found["broken"], found["machine"]["compiler"]) == ([], [], None)


@on_cpu
def test_a_torch_for_cpus_is_broken_where_gpus_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = tuple(f"NIC{number}" for number in range(8))
    put_nvidia_smi(tmp_path / "bin", monkeypatch, rows=ROWS, matrix=topology(cards=cards))
    found = doctor(1)
    assert found["gpus"]["gpus"][7] == {
        "index": 7, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 << 20, "capability": "9.0",
        "driver": "570.133.20",
    }  # fmt: skip
    assert found["gpus"]["cuda"] == "12.8"
    assert (found["gpus"]["topology"]["nvlinks"], tuple(found["gpus"]["topology"]["cards"])) == (18, cards)
    told = {one["told"]: one["mend"] for one in found["broken"]}
    assert f"torch {torch.__version__} is built for CPUs, this machine has 8 GPUs" in told
    assert (found["verbs"]["plan"], found["verbs"]["run"], found["verbs"]["doctor"]) == ("works", "broken", "works")
    page = CliRunner().invoke(app, ["doctor"]).stdout
    assert "links         18 NVLinks between any two GPUs; network cards: NIC0, NIC1" in page
    assert "\n              pip install --force-reinstall torch " in page


def test_a_topology_that_is_no_cluster_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, rows=ROWS, matrix=topology(link=lambda a, b: "SYS"))
    found = find_gpus()
    assert (len(found.gpus), found.topology) == (8, None)
    assert found.topology_problem == (
        "nvidia-smi topo -m: GPU0 and GPU1 have no NVLink (SYS); a cluster file has one kind of link, between all GPUs "
        "alike"
    )


def test_a_driver_that_does_not_answer_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, rows=NO_DRIVER, matrix="", exit_code=9)
    told = f"nvidia-smi fails with exit code 9: {NO_DRIVER}"
    assert (find_gpus().gpus, find_gpus().problem) == ((), told)
    assert told in [one["told"] for one in doctor(1)["broken"]]


@pytest.mark.parametrize("exit_code", [0, 6])
def test_a_driver_without_devices_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, rows="No devices were found", matrix="", exit_code=exit_code)
    assert find_gpus().gpus == () and find_gpus().problem is None


def test_unreadable_rows_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, rows="0, NVIDIA H100, [N/A], 9.0, 570", matrix="")
    problem = find_gpus().problem
    assert problem is not None and "printed '0, NVIDIA H100, [N/A], 9.0, 570'" in problem


def python_without(folder: Path, *absent: str) -> list[str]:
    """Return how to start a Python that has every package of this one but those whose names begin so."""
    site = Path(sysconfig.get_path("purelib"))
    folder.mkdir()
    for path in site.iterdir():
        if not path.name.lower().startswith(absent):
            (folder / path.name).symlink_to(path)
    start = f"import sys, site; sys.path.append({str(folder)!r}); site.addsitedir({str(folder)!r})"
    return [sys.executable, "-I", "-S", "-c", f"{start}\nfrom sparsering.cli import main\nmain()"]


def test_without_torch_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvidia_smi(tmp_path, monkeypatch)
    python = python_without(tmp_path / "site", "torch", "triton", "transformers", "functorch")
    done = subprocess.run([*python, "doctor"], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "torch         not installed" in lines
    assert "              pip install 'torch>=2.11' 'transformers>=5'" in lines
    assert lines[-1].endswith("verbs work here, without a GPU; the others need what is missing.")
    assert max(map(len, lines)) <= 80
    done = subprocess.run([*python, "doctor", "--json"], capture_output=True, text=True, timeout=120, check=False)
    verbs = json.loads(done.stdout)["verbs"]
    assert {name for name in ("plan", "simulate", "doctor", "export") if verbs[name] == "works"} == {
        "plan", "simulate", "doctor", "export",
    }  # fmt: skip
    assert (verbs["run"], verbs["train"], verbs["capture"]) == ("missing",) * 3
    arguments = ["capture", "--model", "m", "--text", "t", "-o", "o", "--columns", "64"]  # an option of a selector
    done = subprocess.run([*python, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("sparsering: this needs torch, which is not installed")
    assert done.stderr.count("\n") == 1
