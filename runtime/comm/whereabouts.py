"""Where this process's main thread is: what a rank that others wait for in vain can say of itself."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

# Files of functions that wait for other ranks. A rank that waits in one of them is not who is waited for.
WAITING = ("distributed/distributed_c10d.py", "comm/channels.py", "comm/words.py", "comm/group.py")
LIBRARIES = ("site-packages", "dist-packages", "<frozen")


def main_thread_place() -> tuple[str, bool]:
    """Return where the main thread is, as "step, adam.py:213", and whether it waits for other ranks there.

    The place is the innermost one that is no library's, where there is one.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end", False
    waits, place, own = False, _told(frame), ""
    while frame is not None:
        waits = waits or frame.f_code.co_filename.endswith(WAITING)
        if not own and not any(part in frame.f_code.co_filename for part in LIBRARIES):
            own = _told(frame)
        frame = frame.f_back
    return own or place, waits


def _told(frame: FrameType) -> str:
    return f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
