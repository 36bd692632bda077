"""Real text that every Python brings along: the sources of its own standard library, found at run time.

Bytes are tokens. Files are taken in the order of their names, the large ones first cut off: no file dominates, and the
same Python gives the same text.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from ...traces.errors import InputError

BYTE_VOCABULARY = 256
MOST_BYTES_OF_A_FILE = 24_576
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


def standard_library_bytes(*, at_least_bytes: int, folder: Path | None = None) -> bytes:
    """Return at least so many bytes of the standard library's sources, the folder by default this Python's own.

    Raises InputError when there is less: some distributions come without sources.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    found = 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            parts.append(path.read_bytes()[:MOST_BYTES_OF_A_FILE])
        except OSError:
            continue
        found += len(parts[-1]) + 1
        if found >= at_least_bytes:
            return b"\n".join(parts)
    raise InputError(f"holds {found} bytes of Python sources, {at_least_bytes} are needed", source=root)


def byte_tokens(text: bytes) -> Tensor:
    """Return int64 [len(text)]: every byte is a token of a vocabulary of 256."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
