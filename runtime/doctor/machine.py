"""The machine itself: cores, memory, room on disk and in shared memory, a C compiler."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this process may use. shared_memory_bytes: size of /dev/shm, None where there is none (macOS).

    compiler: the C compiler that Triton would call, None where there is none.
    """

    python: str
    platform: str
    cores: int
    memory_bytes: int
    free_disk_bytes: int
    shared_memory_bytes: int | None
    compiler: str | None


def this_machine(folder: Path) -> Machine:
    """Look at the machine; folder: whose disk is asked for free space."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        cores=cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_disk_bytes=shutil.disk_usage(folder).free,
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        compiler=next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
    )
