"""The roll call: every rank says what it is before anything else is sent, and all refuse together what does not fit.

What must agree, and how closely (`AGREEING`):

- sparsering, to the letter: what is said at the store, how schedules expand and patterns are hashed is a release's own.
- torch, to the letter, its build included: collectives, and the NCCL that comes with a build, speak no stable protocol.
- transformers to the patch: a release may rename a model's parts, whose gradients ranks add up by place.
- numpy, Triton and Python to the minor version: seeded draws, which ranks repeat on their own, and what a kernel's
  roundings are may change with it; patches keep them.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from ...traces.errors import InputError
from .lost import RankLost, never_joined
from .words import Words, here_key

# How many parts of a version must agree; None: all of it.
AGREEING: Mapping[str, int | None] = {
    "sparsering": None, "torch": None, "transformers": 3, "numpy": 2, "triton": 2, "Python": 2,
}  # fmt: skip


def own_versions() -> dict[str, str | None]:
    """Return this process's version of everything that must agree, None of what is not installed."""
    found: dict[str, str | None] = {"Python": platform.python_version()}
    for name in AGREEING:
        if name not in found:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
    return found


def roll_call(words: Words, *, timeout_s: float) -> None:
    """Say that this rank is here, and wait until all are.

    InputError names the first rank whose world size or versions do not fit rank 0's, or whose number two processes
    have; RankLost names the ranks that did not come. All ranks raise alike.
    """
    deadline = time.monotonic() + timeout_s
    _take_rank(words)
    own = {"world_size": words.world_size, "versions": own_versions()}
    words.store.set(here_key(words.rank), json.dumps(own))
    told: list[dict[str, Any]] = []
    for rank in range(words.world_size):
        if not words.wait(words.store, here_key(rank), deadline):
            raise _missing(words, timeout_s)
        told.append(json.loads(words.store.get(here_key(rank))))
        require_fitting(told)


def require_fitting(told: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError unless what the last rank said of itself fits what rank 0 said."""
    rank, first, last = len(told) - 1, told[0], told[-1]
    if last["world_size"] != first["world_size"]:
        raise InputError(f"rank {rank} was started with {last['world_size']}, rank 0 with {first['world_size']}",
                         field="WORLD_SIZE")  # fmt: skip
    for name, parts in AGREEING.items():
        ours, theirs = first["versions"].get(name), last["versions"].get(name)
        if _start(ours, parts) != _start(theirs, parts):
            told_both = f"rank {rank} has {theirs or 'none'}, rank 0 has {ours or 'none'}"
            raise InputError(f"{told_both}: install the same on all ranks", field=name)  # fmt: skip


def _start(version: str | None, parts: int | None) -> list[str] | str | None:
    if version is None or parts is None:
        return version
    return version.partition("+")[0].split(".")[:parts]


def _take_rank(words: Words) -> None:
    """Take this rank's number; InputError where another process has it."""
    own = f"process {os.getpid()} of {socket.gethostname()}"
    taken = words.store.compare_set(f"sparsering/taken/{words.rank}", "", own).decode()
    if taken != own:
        words.is_double = True
        raise InputError(f"{words.rank} is taken by {taken}: two processes were started as this rank", field="RANK")


def _missing(words: Words, timeout_s: float) -> RankLost:
    ranks = words.absent()
    seen_by = f"rank {words.rank}"
    return words.find(never_joined(ranks, words.world_size, seen_by=seen_by, waited_s=timeout_s))
