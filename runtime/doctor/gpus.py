"""What the driver says of GPUs, through `nvidia-smi`: names, memory, capability, driver, and how they are joined."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...planner.importing.texts import lines_of
from ...planner.importing.topology import Topology, parse_topology
from ...traces.errors import InputError

COMMAND = "nvidia-smi"
FIELDS = ("index", "name", "memory.total", "compute_cap", "driver_version")
TIMEOUT_S = 30
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. capability: as "9.0"."""

    index: int
    name: str
    memory_bytes: int
    capability: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The node's GPUs; none without a driver. cuda: the newest CUDA that the driver supports, as "13.0".

    problem: why nvidia-smi, which is there, does not answer; topology: how GPUs are joined, where they are as a
    cluster file can say it; otherwise topology_problem says what is in the way.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda: str | None = None
    problem: str | None = None
    topology: Topology | None = None
    topology_problem: str | None = None


def find_gpus() -> Gpus:
    """Ask nvidia-smi. Never raises: what it cannot say is told in `problem` and `topology_problem`."""
    if shutil.which(COMMAND) is None:
        return Gpus()
    rows, problem = _asked(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    if "No devices were found" in rows + (problem or ""):
        return Gpus()
    if problem is not None:
        return Gpus(problem=problem)
    try:
        gpus = tuple(_gpu(line) for line in rows.splitlines() if line.strip())
    except ValueError:
        return Gpus(problem=f"{COMMAND} --query-gpu={','.join(FIELDS)} printed {rows.splitlines()[0]!r}")
    version = re.search(r"CUDA Version:\s*([\d.]+)", _asked()[0])
    topology, topology_problem = _topology()
    return Gpus(
        gpus=gpus, cuda=version[1] if version else None, topology=topology, topology_problem=topology_problem
    )  # fmt: skip


def _asked(*arguments: str) -> tuple[str, str | None]:
    """Return what nvidia-smi prints, and in one line why it failed, or None."""
    try:
        done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{COMMAND} does not answer: {error}"
    if done.returncode == 0:
        return done.stdout, None
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
    return done.stdout, f"{COMMAND} fails with exit code {done.returncode}: {said}"


def _gpu(line: str) -> Gpu:
    index, name, memory_mib, capability, driver = (part.strip() for part in line.split(","))
    return Gpu(
        index=int(index), name=name, memory_bytes=int(memory_mib) * MIB, capability=capability, driver=driver
    )  # fmt: skip


def _topology() -> tuple[Topology | None, str | None]:
    text, problem = _asked("topo", "-m")
    if problem is not None:
        return None, problem
    try:
        return parse_topology(lines_of(text), Path(f"{COMMAND} topo -m")), None
    except InputError as error:
        return None, str(error)
