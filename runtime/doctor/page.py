"""A diagnosis as text of 80 columns: what is here, which verbs work, and what to type where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import fill

from .diagnosis import Diagnosis, Finding
from .packages import OURS

WIDTH, LABEL = 80, 14
GB = 1e9
TORCH_PACKAGES = ("torch", "triton")  # which have lines of their own


def page(found: Diagnosis) -> str:
    """Return the whole text. Commands stand alone on their lines, to be copied."""
    lines = [*_machine(found), *_packages(found), *_gpus(found), *_backends(found), "", *_verbs(found)]
    for title, findings in (("Missing", found.missing), ("Broken", found.broken), ("To know", found.notes)):
        lines += _findings(title, findings)
    return "\n".join([*lines, "", verdict(found)])


def verdict(found: Diagnosis) -> str:
    """Return the last line: in one sentence, whether the verbs work here."""
    where = f"with {len(found.gpus.gpus)} GPUs" if found.gpus.gpus else "without a GPU"
    if found.broken:
        return f"Something is broken: {len(found.broken)} of the above to mend."
    if found.missing:
        working = sum(state == "works" for state in found.verbs.values())
        return f"{working} of {len(found.verbs)} verbs work here, {where}; the others need what is missing."
    return f"Every verb works here, {where}."


def _line(label: str, text: str) -> str:
    head, indent = f"{label:<{LABEL - 1}} ", " " * LABEL
    return fill(
        text, WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _machine(found: Diagnosis) -> Iterator[str]:
    machine = found.machine
    yield _line(OURS, str(found.versions[OURS]))
    yield _line("python", f"{machine.python} on {machine.platform}")
    shared = machine.shared_memory_bytes
    parts = [f"{machine.cores} cores", f"{machine.memory_bytes / GB:,.1f} GB memory"]
    parts.append(f"{machine.free_disk_bytes / GB:,.1f} GB free on the disk of this folder")
    parts += [] if shared is None else [f"{shared / GB:,.2f} GB in /dev/shm"]
    parts.append(f"C compiler {machine.compiler}" if machine.compiler else "no C compiler")
    yield _line("machine", ", ".join(parts))


def _packages(found: Diagnosis) -> Iterator[str]:
    versions, torch = found.versions, found.torch
    if versions["torch"] is None:
        yield _line("torch", "not installed")
    else:
        built = f"built for CUDA {torch.cuda}" if torch.cuda else "built for CPUs"
        nccl = f", NCCL {torch.nccl}" if torch.nccl else ""
        yield _line("torch", f"{versions['torch']}, {'cannot be imported' if torch.import_error else built + nccl}")
    fits = {finding.told.partition(":")[0] for finding in found.broken}
    fit = ", not the one that torch requires" if "triton" in fits else ", fits torch"
    fit = fit if versions["torch"] else ""
    yield _line("triton", f"{versions['triton']}{fit}" if versions["triton"] else "not installed")
    others = {name: version for name, version in versions.items() if name not in (OURS, *TORCH_PACKAGES)}
    yield _line("others", ", ".join(f"{name} {version}" for name, version in others.items() if version))
    yield _line("not here", ", ".join(name for name, version in others.items() if not version) or "nothing")


def _gpus(found: Diagnosis) -> Iterator[str]:
    gpus = found.gpus
    if not gpus.gpus:
        yield _line("gpu", "nvidia-smi does not answer" if gpus.problem else "none")
    for gpu in gpus.gpus:
        text = f"{gpu.name}, {gpu.memory_bytes / GB:,.1f} GB, capability {gpu.capability}, driver {gpu.driver}"
        yield _line(f"gpu {gpu.index}", f"{text} (CUDA up to {gpus.cuda})" if gpus.cuda else text)
    if gpus.topology is not None:
        joined = f"{gpus.topology.nvlinks} NVLinks between any two GPUs" if gpus.topology.nvlinks else "one GPU"
        cards = ", ".join(gpus.topology.cards) or "none"
        yield _line("links", f"{joined}; network cards: {cards}")


def _backends(found: Diagnosis) -> Iterator[str]:
    for name, told in found.torch.backends.items():
        detail = told.get("reason") or f"largest error {told['largest_error']:.1e} in {told['dtype']}"
        yield _line(name, f"{told['state']}: {detail}")


def _verbs(found: Diagnosis) -> Iterator[str]:
    for state, title in (("works", "Working"), ("missing", "Missing"), ("broken", "Broken")):
        names = [name for name, its in found.verbs.items() if its == state]
        if names:
            yield _line(title, ", ".join(names))


def _findings(title: str, findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield ""
        yield _line(title, finding.told)
        if finding.mend is not None:
            yield " " * LABEL + finding.mend
