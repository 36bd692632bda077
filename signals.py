"""Signals of the command line: Ctrl-C and SIGTERM end it in order, at a moment when no library misunderstands them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

IMPORT_POLL_S = 0.02
IMPORTING = "<frozen importlib._bootstrap>"
_raised: list[int] = []  # the signals that became KeyboardInterrupt


@contextmanager
def heeded() -> Iterator[None]:
    """Within, SIGINT raises KeyboardInterrupt, SIGTERM SystemExit. Then the process ends, and hears no more."""
    if "RANK" not in os.environ:  # a rank may wait for others in a place that no handler reaches
        for number in (signal.SIGINT, signal.SIGALRM):
            signal.signal(number, _interrupted)
        signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGALRM):  # a library may send again what it had held back
            signal.signal(number, signal.SIG_IGN)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not within an import: libraries take it there for a module that cannot be imported.

    While one goes on, an alarm asks again.
    """
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            signal.setitimer(signal.ITIMER_REAL, IMPORT_POLL_S)
            return
        frame = frame.f_back
    _raised.append(number)
    raise KeyboardInterrupt


@contextmanager
def never_misread(*errors: type[BaseException]) -> Iterator[None]:
    """Within, these errors are KeyboardInterrupt once that was raised.

    It may end a library in the midst of closing a file: then what comes out is that the file cannot be read.
    """
    try:
        yield
    except errors as error:
        if _raised:
            raise KeyboardInterrupt from error
        raise


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End in order: temporary files are removed, ranks are ended."""
    raise SystemExit(128 + number)
