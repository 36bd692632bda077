"""Heartbeats: what every rank says at the store every few seconds, heard by all, on a connection and thread of its own.

A rank's word is a number that grows, or its last word: LEFT, or LOST with the ranks that it found lost.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

LEFT, LOST = "left", "lost"


def connection_of_its_own(store: Store, timeout: timedelta) -> Store | None:
    """Return another connection to the server of a TCPStore, prefixes left out; None for other kinds of store.

    A wait on one connection holds up everybody who shares it.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return None
    return TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timeout)


def last_word(word: str | None) -> bool:
    """Whether a rank will say nothing more."""
    return word is not None and word.startswith((LEFT, LOST))


def lost_ranks(word: str | None) -> list[int]:
    """Return the ranks that this word calls lost."""
    if word is None or not word.startswith(LOST):
        return []
    return [int(rank) for rank in word.removeprefix(LOST).split(",")]


class Heartbeat:
    """Says this rank's word and hears all others', once every `interval_s`, until `stop`.

    rounds: how often all were heard; heard: each rank's word then, None of ranks that said nothing yet. said_last:
    whether the store has this rank's last word. error: what the store failed with; nothing is said or heard after it.
    Only this thread blocks with a store that does not answer.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int, interval_s: float) -> None:
        self.heard: list[str | None] = [None] * world_size
        self.rounds = 0
        self.said_last = False
        self.error: Exception | None = None
        self._store, self._rank, self._interval_s = store, rank, interval_s
        self._keys = [f"rank {number}" for number in range(world_size)]
        self._last_word: str | None = None
        self._stopped, self._wake = threading.Event(), threading.Event()
        self._news = threading.Condition()
        store.set(self._keys[rank], "0")  # from here on, silence counts
        self._thread = threading.Thread(target=self._serve, name="sparsering-heartbeat", daemon=True)
        self._thread.start()

    def say(self, word: str, *, timeout_s: float) -> None:
        """Say the last word; wait at most so long until the store has it. A word that was said stands."""
        self._last_word = self._last_word or word
        self._wake.set()
        with self._news:
            self._news.wait_for(lambda: self.said_last or self.error is not None, timeout_s)

    def stop(self, *, timeout_s: float) -> None:
        """Say nothing more. Waits for a round that is under way."""
        self._stopped.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def wait_for_last_words(self, *, but: Collection[int] = (), timeout_s: float) -> bool:
        """Wait until all others, `but` these ranks, said their last word; False when that takes too long."""
        ranks = [rank for rank in range(len(self._keys)) if rank not in (self._rank, *but)]
        with self._news:
            self._news.wait_for(lambda: self.error is not None or self._all_ended(ranks), timeout_s)
            return self._all_ended(ranks)

    def _all_ended(self, ranks: Collection[int]) -> bool:
        return all(last_word(self.heard[rank]) for rank in ranks)

    def _serve(self) -> None:
        try:
            while not self._stopped.is_set():
                self._round()
                self._wake.wait(self._interval_s)
                self._wake.clear()
        except Exception as error:  # whoever watches says what it means
            with self._news:
                self.error = error
                self._news.notify_all()

    def _round(self) -> None:
        word = self._last_word
        self._store.set(self._keys[self._rank], word or str(self.rounds + 1))
        self.said_last = word is not None
        # Asking for a key that is not there yet would wait for it.
        began = [rank for rank, heard in enumerate(self.heard) if heard or self._store.check([self._keys[rank]])]
        words = self._store.multi_get([self._keys[rank] for rank in began])
        heard = dict(zip(began, words, strict=True))
        with self._news:
            self.heard = [heard[rank].decode() if rank in heard else None for rank in range(len(self._keys))]
            self.rounds += 1
            self._news.notify_all()
