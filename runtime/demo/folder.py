"""The demo's output folder: made beside its place and moved there whole; only a folder of the demo is ever replaced."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...traces.dataset.whole_folder import remove_left_folders
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
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_left_folders(folder)
        working = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    handle = os.open(working, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # says that it is in use
        yield working
        working.chmod(0o755)
        require_replaceable(folder)  # two minutes have passed
        _exchange(working, folder)
    finally:
        os.close(handle)
        shutil.rmtree(working, ignore_errors=True)


def _exchange(working: Path, folder: Path) -> None:
    """Move the old folder aside, the new one in its place, and only then remove the old one."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    try:
        if folder.exists():
            folder.rename(aside / folder.name)
        working.rename(folder)
    except OSError:
        if (aside / folder.name).exists() and not folder.exists():
            (aside / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
