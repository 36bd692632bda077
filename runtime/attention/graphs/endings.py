"""Recordings end before communicators do.

NCCL ends no communicator, and aborts none, as long as a CUDA graph lives that has its transfers: the call never
returns. Whoever ends the process group (a script, `leave`, a trainer of others, the interpreter) knows nothing of our
graphs, and an error on its way out keeps them alive in its frames. So they are dropped where every group ends.

Only the main thread drops them, which replays them. Where a rank is lost, the sentinel aborts groups from threads of
its own while a replay may be under way: the transfers end at once, and the process after them.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol
from weakref import WeakSet

import torch.distributed as dist


class Recordings(Protocol):
    """What holds recordings."""

    def forget(self) -> None:
        """Drop them all, whoever else refers to them."""
        ...


_alive: WeakSet[Any] = WeakSet()


def end_before_groups(recordings: Recordings) -> None:
    """Have recordings forgotten before the main thread ends or aborts any process group, and when the process exits.

    They may be made anew afterwards, for groups that live.
    """
    _listen()
    _alive.add(recordings)


@cache
def _listen() -> None:
    for name in ("shutdown", "abort"):  # of the class: every way to end a group comes through one of them
        setattr(dist.ProcessGroup, name, _after_recordings(getattr(dist.ProcessGroup, name)))
    atexit.register(_forget_all)


def _forget_all() -> None:
    for recordings in list(_alive):
        recordings.forget()


def _after_recordings(end: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(end, assigned=())
    def ended(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            _forget_all()
        return end(*arguments, **named)

    return ended
