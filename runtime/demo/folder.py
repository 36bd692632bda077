"""The demo's output folder: made beside its place and moved there whole; only a folder of the demo is ever replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...traces.dataset.whole_folder import working_folder
from ...traces.errors import InputError
from ...traces.files import read_json

TRACE = "trace"
PLAN_CLUSTER = "plan-a100x32.json"
PLAN_LOCAL = "plan-local4.json"
SIMULATED = "timeline-simulated.json.gz"
MEASURED = "timeline-measured.json.gz"
METRICS = "metrics.json"
REPORT = "report.html"
CONTENT = (TRACE, PLAN_CLUSTER, PLAN_LOCAL, SIMULATED, MEASURED, METRICS, REPORT)
KIND = "sparsering-demo"


def require_replaceable(folder: Path) -> None:
    """Raise InputError unless the path is free, an empty folder, or an earlier demo's output and nothing else."""
    if not folder.is_symlink() and not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError("exists and is no folder; choose another --output", source=folder)
    found = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in found if name not in CONTENT]
    if foreign:
        raise InputError(f"holds {foreign[0]!r}, which no demo wrote; choose another --output", source=folder)
    metrics = None
    with suppress(InputError):
        metrics = read_json(folder / METRICS)
    if found and not (isinstance(metrics, dict) and metrics.get("kind") == KIND):
        raise InputError("was not written by the demo; choose another --output", source=folder)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `folder` when the block ends well; else nothing is left of it."""
    require_replaceable(folder)
    try:
        working, handle = working_folder(folder)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    try:
        yield working
        working.chmod(0o755)
        require_replaceable(folder)  # two minutes have passed
        _exchange(working, folder)
    finally:
        os.close(handle)
        shutil.rmtree(working, ignore_errors=True)


def _exchange(working: Path, folder: Path) -> None:
    """Move the old folder aside, the new one in its place, and only then remove the old one."""
    aside, handle = working_folder(folder)
    try:
        if folder.exists():
            folder.rename(aside / folder.name)
        working.rename(folder)
    except OSError:
        if (aside / folder.name).exists() and not folder.exists():
            (aside / folder.name).rename(folder)
        raise
    finally:
        os.close(handle)
        shutil.rmtree(aside, ignore_errors=True)
