"""The last word: what a rank that ends says to all others, through the store, before it does.

There is one, the first that anybody says: of a chain of failures the others name the beginning. A rank that raises says
why; one that finds others lost says whom; the launcher says it of ranks that a signal ended. Everybody who waits at the
store looks for it, and who sees a transfer fail asks for it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from .lost import RankLost, host_lost, late, nobody_lost, rank_ended, ranks_lost

GRACE_S = 5.0  # in which living ranks answer, and the store's host stays for who still reads
ANSWER_S = 0.5  # how often a rank looks whether somebody asks
ENDING_S = 10.0  # in which a rank must come to know a last word by itself: before its launcher ends it
STDERR = 2
SHORTEST_S, POLL_S = 0.001, 0.05  # between two looks at the store
LAST_WORD = "sparsering/last word"
QUESTIONS = "sparsering/questions"  # how many were asked
PARTED = "sparsering/parted"  # there once no rank is waited for any more
MAX_CHARACTERS = 300
# Files of functions that wait for other ranks. A rank that waits in one of them is not who is waited for.
WAITING = ("distributed/distributed_c10d.py", "comm/channels.py", "comm/words.py", "comm/parting.py", "comm/group.py")
LIBRARIES = ("site-packages", "dist-packages", "<frozen")
_TIMED_OUT = re.compile("time-?out|timed out", re.IGNORECASE)


def attempt_prefix(attempt: int, join: int = 1) -> str:
    """Return what the keys of an attempt begin with: what ranks of the last one left must not be read."""
    return f"attempt {attempt}" if join == 1 else f"attempt {attempt} join {join}"


def here_key(rank: int) -> str:
    """Return where a rank answers the roll call."""
    return f"sparsering/here/{rank}"


def ended_key(rank: int) -> str:
    """Return where a rank says that it reads nothing more."""
    return f"sparsering/ended/{rank}"


class Words:
    """What this process says and hears.

    store: of all processes; is_host: whether it ends with this process. timeout_s: how long ranks wait for each other.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, store_host: str, timeout_s: float = 600.0
    ) -> None:  # fmt: skip
        self.store, self.rank, self.world_size, self.store_host = store, rank, world_size, store_host
        self.timeout_s = timeout_s
        self.is_double = False  # whether another process is this rank: then what is said of the rank is not of this one
        self._thread: threading.Thread | None = None
        self._stopped, self._known = threading.Event(), threading.Event()
        self._told: RankLost | None = None
        self._lost: set[int] = set()
        self.saw_parting = False  # whether all were known to have parted when this process last looked

    @property
    def is_host(self) -> bool:
        """Whether the store ends with this process."""
        return self.store_host == f"rank {self.rank}"

    @property
    def is_answering(self) -> bool:
        """Whether this process answers those who ask who lives, as then all do."""
        return self._thread is not None and not self._stopped.is_set()

    @property
    def knows(self) -> bool:
        """Whether this process has come to know of ranks that end for another reason than that all is done."""
        return self._known.is_set()

    def over(self, store: Store) -> Words:
        """Return the same over another connection."""
        return Words(store, rank=self.rank, world_size=self.world_size, store_host=self.store_host,
                     timeout_s=self.timeout_s)  # fmt: skip

    def say(self, error: BaseException) -> None:
        """Say why this rank ends, unless somebody said a last word before. Of lost ranks their finder has told."""
        self._known.set()
        if isinstance(error, RankLost):
            self._lost |= set() if error.alive else set(error.ranks)
            return
        if self.is_double and not self.absent():
            return  # all are here without this one, and have begun: they go on
        told = _first_line(error)
        said = told if isinstance(error, ValueError) and told else f"{type(error).__name__}: {told}".rstrip(": ")
        self.find(rank_ended(self.rank, self.world_size, said=said))

    def absent(self) -> list[int]:
        """Return the ranks that have not answered the roll call yet. Raises what the store does when it is gone."""
        return [rank for rank in range(self.world_size) if not self.store.check([here_key(rank)])]

    def find(self, lost: RankLost) -> RankLost:
        """Say that ranks are lost, unless a last word was said before; return the error that all are to raise."""
        self._known.set()
        with suppress(dist.DistError, RuntimeError):  # nobody can hear it where the store is gone
            word = {"ranks": list(lost.ranks), "alive": lost.alive, "told": str(lost)}
            self.store.compare_set(LAST_WORD, "", json.dumps(word))
            return self.heard() or lost
        return lost

    def heard(self) -> RankLost | None:
        """Return what the last word says, None where nobody said one. Raises what the store does when it is gone."""
        if not self.store.check([LAST_WORD]):
            return None
        word = json.loads(self.store.get(LAST_WORD))
        self._lost |= set() if word["alive"] else set(word["ranks"])
        lost = RankLost(word["told"])
        lost.ranks, lost.alive = word["ranks"], word["alive"]
        return lost

    def wait(self, store: Store, key: str, deadline: float) -> bool:
        """Wait for a key of a store, this one behind a prefix perhaps; return whether it came.

        deadline: of the monotonic clock. Raises RankLost when somebody says a last word, or the store is gone.
        """
        pause_s = SHORTEST_S
        try:
            while not store.check([key]):
                if (lost := self.heard()) is not None:
                    self._known.set()
                    raise lost
                if time.monotonic() > deadline:
                    return False
                time.sleep(pause_s)  # torch's own wait for a key writes two lines whenever its time is over
                pause_s = min(2 * pause_s, POLL_S)
        except RankLost:
            raise
        except (dist.DistError, RuntimeError) as error:
            seen_by, because = f"rank {self.rank}", _first_line(error)
            gone = host_lost(self.store_host, self.world_size, seen_by=seen_by, because=because)
            raise (self._told or gone) from error
        return True

    def survivors(self, ranks: Sequence[int], because: object) -> RankLost:
        """Return who is lost of these, this rank among them, after a transfer between them failed.

        A last word tells. Else this rank asks, and who does not answer in GRACE_S is lost: living ranks do, also those
        that still compute or wait for somebody else (`answer`). When all do, nobody died: a rank was late beyond the
        time-out, which is who neither sees anything fail nor waits itself, or a link failed.
        """
        seen_by, because = f"rank {self.rank}", _first_line(because)
        self._known.set()
        try:
            self.store.set(_failed(self.rank), because)
            missing = self.ask(ranks)
            lost = self.heard()
            if lost is None and missing:
                lost = self.find(ranks_lost(missing, self.world_size, seen_by=seen_by, because=because))
            lost = lost or self._late(ranks, seen_by)
            return lost or self.find(nobody_lost(self.rank, because=because))
        except (dist.DistError, RuntimeError):
            return self._told or host_lost(self.store_host, self.world_size, seen_by=seen_by, because=because)

    def missed(self, rank: int, because: str) -> RankLost:
        """Return the error for a rank that did not come in time: where it is, if it lives."""
        seen_by = f"rank {self.rank}"
        self._known.set()
        try:
            question, missing = self._asked([rank])
            if missing:
                return self.find(ranks_lost(missing, self.world_size, seen_by=seen_by, because=because))
            place, _ = json.loads(self.store.get(_answer(question, rank)))
            return self.find(late({rank: place}, self.world_size, seen_by=seen_by, because=because))
        except (dist.DistError, RuntimeError):
            return self._told or host_lost(self.store_host, self.world_size, seen_by=seen_by, because=because)

    def _late(self, ranks: Sequence[int], seen_by: str) -> RankLost | None:
        """Return the loss of living ranks that neither see a transfer fail, nor wait for others; None where all do.

        Who waits began to at another moment, perhaps: it gets GRACE_S to see its own transfer fail. None also where
        nobody's time was over: gloo closes connections then, so others see something else fail.
        """
        unfailed = self._missing({rank: _failed(rank) for rank in ranks}, GRACE_S)
        if (lost := self.heard()) is not None or not unfailed:
            return lost
        reasons = [self.store.get(_failed(rank)).decode() for rank in ranks if rank not in unfailed]
        because = next(filter(_TIMED_OUT.search, reasons), None)
        if because is None:
            return None
        question, missing = self._asked(unfailed)
        found = {rank: json.loads(self.store.get(_answer(question, rank))) for rank in unfailed if rank not in missing}
        places = {rank: place for rank, (place, waits) in found.items() if not waits}
        return self.find(late(places, self.world_size, seen_by=seen_by, because=because)) if places else self.heard()

    def ask(self, ranks: Sequence[int]) -> list[int]:
        """Ask who lives; return who of these does not answer in GRACE_S."""
        return self._asked(ranks)[1]

    def _asked(self, ranks: Sequence[int]) -> tuple[int, list[int]]:
        """Ask who lives; return the question's number, and who does not answer in GRACE_S."""
        question = self.store.add(QUESTIONS, 1)
        self.store.set(_answer(question, self.rank), json.dumps(main_thread_place()))
        return question, self._missing({rank: _answer(question, rank) for rank in ranks}, GRACE_S)

    def answer(self, connection: Store | None = None) -> None:
        """From now on answer those who ask who lives, on a thread of its own, until `stop`.

        connection: to the same keys, which nobody else uses: a wait of this process on its other one holds this thread
        up. The thread also ends this process, with exit code 1, where somebody said a last word and the main thread
        does not come to know it: torch makes groups by waiting for others' keys, and hears nothing else meanwhile.
        """
        if self._thread is not None:
            return
        asked = self if connection is None else self.over(connection)
        self._thread = threading.Thread(target=self._serve, args=(asked,), name="sparsering-answers", daemon=True)
        self._thread.start()
        # A thread that comes back from C++ into an interpreter that is going takes the process down by a signal.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Answer no more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(GRACE_S)
        atexit.unregister(self.stop)

    def _serve(self, asked: Words) -> None:
        answered, told_at = 0, None
        with suppress(dist.DistError, RuntimeError):  # the store is gone, and with it whoever asks
            while not self._stopped.wait(ANSWER_S):
                self._told = asked.heard()  # for when the store is gone
                self.saw_parting = self.saw_parting or asked.store.check([PARTED])
                if self._told is not None and not self._known.is_set():
                    told_at = told_at or time.monotonic()
                    if time.monotonic() - told_at > ENDING_S:
                        os.write(STDERR, f"sparsering: {self._told}\n".encode())
                        os._exit(1)
                for question in range(answered + 1, asked.store.add(QUESTIONS, 0) + 1):
                    asked.store.set(_answer(question, self.rank), json.dumps(main_thread_place()))
                    answered = question

    def stay(self) -> None:
        """Keep the store open, at most GRACE_S, until all others read nothing more: they may have yet to come."""
        if not self.is_host:
            return
        keys = {rank: ended_key(rank) for rank in range(self.world_size) if rank != self.rank}
        with suppress(dist.DistError, RuntimeError):
            self._missing(keys, GRACE_S, listening=False)

    def end(self) -> None:
        """Say that this rank reads nothing more. The store's host stays, at most GRACE_S, until none of the others do.

        Who never came, or is known to be lost, is not waited for.
        """
        with suppress(dist.DistError, RuntimeError):
            if self.is_double:
                return
            self.store.set(ended_key(self.rank), "yes")
            if self.rank == 0 and not self.knows:
                self.store.set(PARTED, "yes")  # it looks after nobody any more
            if self.is_host:
                absent = self._lost.union(self.absent())
                keys = {rank: ended_key(rank) for rank in range(self.world_size) if rank not in absent}
                self._missing(keys, GRACE_S, listening=False)

    def _missing(self, keys: dict[int, str], wait_s: float, *, listening: bool = True) -> list[int]:
        """Wait, at most so long, for all of the keys, or for a last word; return the ranks whose key is not there."""
        deadline = time.monotonic() + wait_s
        missing: Collection[int] = list(keys)
        while True:
            missing = [rank for rank in missing if not self.store.check([keys[rank]])]
            if not missing or time.monotonic() > deadline or (listening and self.heard() is not None):
                return missing
            time.sleep(POLL_S)


def _answer(question: int, rank: int) -> str:
    return f"sparsering/answers/{question}/{rank}"


def _failed(rank: int) -> str:
    return f"sparsering/failed/{rank}"


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0][:MAX_CHARACTERS]


def main_thread_place() -> tuple[str, bool]:
    """Return where the main thread is, as "step, adam.py:213", and whether it waits for other ranks there.

    The place is the innermost one that is no library's, where there is one.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end", False
    waits, place, own = False, _shown(frame), ""
    while frame is not None:
        waits = waits or frame.f_code.co_filename.endswith(WAITING)
        if not own and not any(part in frame.f_code.co_filename for part in LIBRARIES):
            own = _shown(frame)
        frame = frame.f_back
    return own or place, waits


def _shown(frame: FrameType) -> str:
    return f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
