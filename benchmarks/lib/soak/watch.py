"""What processes hold, read from /proc: memory, descriptors, threads, listening sockets, children, shared memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")
LISTENING = "0A"  # of /proc/net/tcp's column `st`
QUANTITIES = ("memory_bytes", "descriptors", "threads", "listening", "children", "shared_memory")


def held_by(process: int) -> dict[str, int]:
    """Return what a process holds now, by QUANTITIES. FileNotFoundError or ProcessLookupError where it has ended."""
    own = PROC / str(process)
    # Pages of files are left out, libraries' above all: others share them, or happen not to at the moment, and the
    # kernel takes them back when it likes.
    rollup = dict(line.split(":", 1) for line in (own / "smaps_rollup").read_text().splitlines()[1:])
    anonymous = int(rollup["Anonymous"].split()[0])
    targets = list(_targets(own / "fd"))
    sockets = {target[8:-1] for target in targets if target.startswith("socket:[")}
    return {
        "memory_bytes": anonymous * 1024,
        "descriptors": len(targets),
        "threads": len(os.listdir(own / "task")),
        "listening": len(sockets & _listening_sockets(own)),
        "children": len(children_of(process)),
        "shared_memory": sum(str(SHARED_MEMORY) in line for line in (own / "maps").read_text().splitlines()),
    }


def rest() -> None:
    """Let go of what nobody holds in this process, and have the allocator give it back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def children_of(process: int) -> list[int]:
    """Return the living children of a process, whichever of its threads started them."""
    found = []
    for task in (PROC / str(process) / "task").iterdir():
        try:
            found += [int(number) for number in (task / "children").read_text().split()]
        except OSError:
            continue  # the thread has ended
    return found


def marked(mark: str) -> dict[int, str]:
    """Return the living processes whose environment has this text in it, and their command lines."""
    found = {}
    for entry in PROC.iterdir():
        try:
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line:
                    found[int(entry.name)] = line.strip()
        except OSError:
            continue  # it has ended, or is another user's
    return found


def shared_memory_of(processes: Iterable[int]) -> list[str]:
    """Return the files of shared memory whose names hold the number of one of these processes."""
    numbers = {str(process) for process in processes}
    if not SHARED_MEMORY.is_dir():
        return []
    parted = {path.name: set("".join(c if c.isdigit() else " " for c in path.name).split())
              for path in SHARED_MEMORY.iterdir()}  # fmt: skip
    return sorted(name for name, parts in parted.items() if parts & numbers)


def files_below(folder: Path) -> list[str]:
    """Return all files and folders below one, as seen from it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _targets(folder: Path) -> Iterable[str]:
    for entry in os.listdir(folder):
        try:
            yield os.readlink(folder / entry)
        except OSError:
            continue  # the one that lists them


def _listening_sockets(own: Path) -> set[str]:
    """Return the inodes of all TCP sockets that listen in a process's network."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in (own / "net" / name).read_text().splitlines()[1:]]
    return {fields[9] for fields in lines if fields[3] == LISTENING}
