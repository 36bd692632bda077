"""What works on this machine, what is missing, what is broken, and the command that mends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .gpus import Gpus, find_gpus
from .machine import Machine, this_machine
from .packages import Unmet, install_command, triton_misfit, unmet, version_of, versions
from .torch_facts import TorchFacts, torch_facts

TORCH_HOUSES = ("runtime", "kernels")  # whose verbs need torch: docs/architecture.md
ON_GPUS_ONLY = ("triton", "liger-kernel")  # of the extra `gpu`
LEAST_CAPABILITY = 8.0  # of the Triton kernels
SMALLEST_SHARED_MEMORY_BYTES = 1 << 30  # a container's default of 64 MiB ends ranks of one host that share it
REINSTALL = "pip install --force-reinstall"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is missing, broken or worth knowing. mend: a command, or what to do; None: nothing to be done."""

    told: str
    mend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that `doctor` found. verbs: by name, "works", "missing" or "broken"."""

    machine: Machine
    versions: dict[str, str | None]
    torch: TorchFacts
    gpus: Gpus
    verbs: dict[str, str]
    missing: tuple[Finding, ...]
    broken: tuple[Finding, ...]
    notes: tuple[Finding, ...]


def diagnose(verb_modules: Mapping[str, str], folder: Path) -> Diagnosis:
    """Look at everything. verb_modules: the module of every verb, as "runtime.run.command"; folder: whose disk."""
    machine, gpus = this_machine(folder), find_gpus()
    torch = torch_facts() if version_of("torch") else TorchFacts()
    core, extra = unmet(), _needed(unmet("gpu"), gpus)
    for_torch = [*_outdated(extra), *_torch_problems(torch, gpus), *_gpu_problems(gpus, machine)]
    broken_core = [Finding(told=str(one), mend=install_command([one])) for one in core]
    absent = [one for one in extra if one.installed is None]
    return Diagnosis(
        machine=machine,
        versions=versions(),
        torch=torch,
        gpus=gpus,
        verbs={
            verb: _state(module, core=bool(core), broken=bool(for_torch), missing=bool(absent))
            for verb, module in verb_modules.items()
        },
        missing=_missing(absent),
        broken=(*broken_core, *for_torch),
        notes=tuple(_notes(gpus, machine)),
    )


def _needed(requirements: list[Unmet], gpus: Gpus) -> list[Unmet]:
    """Return what of the extra is missing and needed here: without GPUs, nothing that only GPUs use."""
    return [one for one in requirements if gpus.gpus or not one.requirement.startswith(ON_GPUS_ONLY)]


def _outdated(requirements: list[Unmet]) -> list[Finding]:
    return [Finding(told=str(one), mend=install_command([one])) for one in requirements if one.installed is not None]


def _missing(absent: list[Unmet]) -> tuple[Finding, ...]:
    if not absent:
        return ()
    names = ", ".join(one.requirement for one in absent)
    return (Finding(told=f"not installed: {names}", mend=install_command(absent)),)


def _state(module: str, *, core: bool, broken: bool, missing: bool) -> str:
    """Return a verb's state; `doctor` is the one verb of its house that needs no torch."""
    needs_torch = module.partition(".")[0] in TORCH_HOUSES and not module.startswith("runtime.doctor")
    if core or (needs_torch and broken):
        return "broken"
    return "missing" if needs_torch and missing else "works"


def _torch_problems(torch: TorchFacts, gpus: Gpus) -> list[Finding]:
    found = []
    if torch.import_error:
        found.append(Finding(told=f"torch cannot be imported: {torch.import_error}", mend=f"{REINSTALL} torch"))
    elif torch.version and gpus.gpus and not torch.gpus:
        found.append(_blind(torch, gpus))
    if torch.backends_error:
        found.append(Finding(told=f"the kernels cannot be imported: {torch.backends_error}"))
    if misfit := triton_misfit():
        told = f"triton: torch {version_of('torch')} requires {misfit.requirement}, "
        told += f"{misfit.installed} is installed" if misfit.installed else "it is not installed"
        found.append(Finding(told=told, mend=install_command([misfit])))
    for name, verdict in torch.backends.items():
        if verdict["state"] == "wrong":
            told = f"backend {name} computes wrong numbers here, {verdict['largest_error']:.1e} off: do not use it"
            found.append(Finding(told=told, mend="sparsering doctor --kernels"))
    return found


def _blind(torch: TorchFacts, gpus: Gpus) -> Finding:
    """Say why torch finds no GPU where the driver lists some."""
    if torch.cuda is None:
        told = f"torch {torch.version} is built for CPUs, this machine has {len(gpus.gpus)} GPUs"
        return Finding(told=told, mend=f"{REINSTALL} torch --index-url https://pypi.org/simple")
    if gpus.cuda is not None and _numbers(torch.cuda) > _numbers(gpus.cuda):
        told = f"torch {torch.version} is built for CUDA {torch.cuda}, the driver supports CUDA up to {gpus.cuda}"
        mend = f"install a newer driver, or a torch for CUDA {gpus.cuda}: https://pytorch.org/get-started/locally"
        return Finding(told=told, mend=mend)
    told = f"torch finds no GPU, the driver lists {len(gpus.gpus)}"
    return Finding(told=told, mend="check CUDA_VISIBLE_DEVICES, and that a container was started with --gpus all")


def _gpu_problems(gpus: Gpus, machine: Machine) -> list[Finding]:
    found = []
    if gpus.problem:
        found.append(Finding(told=gpus.problem, mend="reinstall the NVIDIA driver, or restart the machine after that"))
    if gpus.gpus and machine.compiler is None:
        found.append(Finding(told="no C compiler, which Triton calls", mend="apt-get install gcc"))
    return found


def _notes(gpus: Gpus, machine: Machine) -> list[Finding]:
    found = []
    weak = [gpu.name for gpu in gpus.gpus if float(gpu.capability) < LEAST_CAPABILITY]
    if weak:
        told = f"{', '.join(dict.fromkeys(weak))}: the kernels need compute capability {LEAST_CAPABILITY}"
        found.append(Finding(told=told))
    if gpus.topology_problem:
        found.append(Finding(told=f"a cluster file cannot be made of the topology: {gpus.topology_problem}"))
    shared = machine.shared_memory_bytes
    if shared is not None and shared < SMALLEST_SHARED_MEMORY_BYTES and len(gpus.gpus) > 1:
        told = f"/dev/shm has {shared / 1e6:,.0f} MB, through which NCCL's ranks on one host may speak"
        found.append(Finding(told=told, mend="start the container with --shm-size=8g"))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
