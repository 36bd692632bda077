"""The last word: what a rank that ends says to all others, through the store, before it does.

There is one, the first that anybody says: of a chain of failures the others name the beginning. A rank that raises says
why; one that finds others lost says whom; the launcher says it of ranks that a signal ended. Everybody who waits at the
store looks for it, and who sees a transfer fail asks for it.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from .lost import RankLost, host_lost, nobody_lost, rank_ended, ranks_lost

GRACE_S = 5.0  # in which living ranks answer, and the store's host stays for who still reads
ANSWER_S = 0.5  # how often a rank looks whether somebody asks
SHORTEST_S, POLL_S = 0.001, 0.05  # between two looks at the store
LAST_WORD = "sparsering/last word"
QUESTIONS = "sparsering/questions"  # how many were asked
MAX_CHARACTERS = 300


def attempt_prefix(attempt: int, join: int = 1) -> str:
    """Return what the keys of an attempt begin with: what ranks of the last one left must not be read."""
    return f"attempt {attempt}" if join == 1 else f"attempt {attempt} join {join}"


class Words:
    """What this process says and hears. store: of all processes; is_host: whether it ends with this process."""

    def __init__(self, store: Store, *, rank: int, world_size: int, store_host: str) -> None:
        self.store, self.rank, self.world_size, self.store_host = store, rank, world_size, store_host
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._told: RankLost | None = None
        self._lost: set[int] = set()

    @property
    def is_host(self) -> bool:
        """Whether the store ends with this process."""
        return self.store_host == f"rank {self.rank}"

    def over(self, store: Store) -> Words:
        """Return the same over another connection."""
        return Words(store, rank=self.rank, world_size=self.world_size, store_host=self.store_host)

    def say(self, error: BaseException) -> None:
        """Say why this rank ends, unless somebody said a last word before. Of lost ranks their finder has told."""
        if isinstance(error, RankLost):
            self._lost |= set(error.ranks)
            return
        told = _first_line(error)
        said = told if isinstance(error, ValueError) and told else f"{type(error).__name__}: {told}".rstrip(": ")
        self.find(rank_ended(self.rank, self.world_size, said=said))

    def find(self, lost: RankLost) -> RankLost:
        """Say that ranks are lost, unless a last word was said before; return the error that all are to raise."""
        with suppress(dist.DistError, RuntimeError):  # nobody can hear it where the store is gone
            self.store.compare_set(LAST_WORD, "", json.dumps({"ranks": list(lost.ranks), "told": str(lost)}))
            return self.heard() or lost
        return lost

    def heard(self) -> RankLost | None:
        """Return what the last word says, None where nobody said one. Raises what the store does when it is gone."""
        if not self.store.check([LAST_WORD]):
            return None
        word = json.loads(self.store.get(LAST_WORD))
        self._lost |= set(word["ranks"])
        lost = RankLost(word["told"])
        lost.ranks = word["ranks"]
        return lost

    def wait(self, store: Store, key: str, deadline: float) -> bool:
        """Wait for a key of a store, this one behind a prefix perhaps; return whether it came.

        deadline: of the monotonic clock. Raises RankLost when somebody says a last word, or the store is gone.
        """
        pause_s = SHORTEST_S
        try:
            while not store.check([key]):
                if (lost := self.heard()) is not None:
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
        time-out, or a link failed.
        """
        seen_by, because = f"rank {self.rank}", _first_line(because)
        try:
            question = self.store.add(QUESTIONS, 1)
            self.store.set(_answer(question, self.rank), "here")
            missing = self._missing({rank: _answer(question, rank) for rank in ranks}, GRACE_S)
            lost = self.heard()
            if lost is None and missing:
                lost = self.find(ranks_lost(missing, self.world_size, seen_by=seen_by, because=because))
        except (dist.DistError, RuntimeError):
            return self._told or host_lost(self.store_host, self.world_size, seen_by=seen_by, because=because)
        return lost or nobody_lost(self.rank, because=because)

    def answer(self) -> None:
        """From now on answer those who ask who lives, on a thread of its own, until `stop`."""
        self._thread = threading.Thread(target=self._serve, name="sparsering-answers", daemon=True)
        self._thread.start()
        # A thread that comes back from C++ into an interpreter that is going takes the process down by a signal.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Answer no more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(GRACE_S)
        atexit.unregister(self.stop)

    def _serve(self) -> None:
        answered = 0
        with suppress(dist.DistError, RuntimeError):  # the store is gone, and with it whoever asks
            while not self._stopped.wait(ANSWER_S):
                self._told = self.heard()  # for when the store is gone
                for question in range(answered + 1, self.store.add(QUESTIONS, 0) + 1):
                    self.store.set(_answer(question, self.rank), "here")
                    answered = question

    def stay(self) -> None:
        """Keep the store open, at most GRACE_S, until all others read nothing more: they may have yet to come."""
        if not self.is_host:
            return
        keys = {rank: f"sparsering/ended/{rank}" for rank in range(self.world_size) if rank != self.rank}
        with suppress(dist.DistError, RuntimeError):
            self._missing(keys, GRACE_S, listening=False)

    def end(self) -> None:
        """Say that this rank reads nothing more. The store's host stays, at most GRACE_S, until none of the others do.

        Who never came, or is known to be lost, is not waited for.
        """
        with suppress(dist.DistError, RuntimeError):
            self.store.set(f"sparsering/ended/{self.rank}", "yes")
            if self.is_host:
                came = [rank for rank in range(self.world_size) if self.store.check([f"sparsering/here/{rank}"])]
                keys = {rank: f"sparsering/ended/{rank}" for rank in came if rank not in self._lost}
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


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0][:MAX_CHARACTERS]
