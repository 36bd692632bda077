"""Watching the other ranks: who falls silent is named, and nobody waits for it for ever.

On GPUs a rank that dies leaves the others in a wait for a device that nothing will ever wake. A sentinel on a thread of
its own hears the heartbeats of all: what every rank says at the store every few seconds, a number that grows, or its
last word (LEFT, or LOST with the ranks that it found lost). When ranks are lost, it aborts the process groups, so that
the main thread comes back and raises RankLost at its next check; a main thread that does not end then is ended.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from ...traces.errors import InputError
from .lost import RankLost, host_lost, late, nobody_lost, ranks_lost

BEATS = 8  # in the time after which a silent rank is lost
STDERR = 2
LEFT, LOST = "left", "lost"
BROKEN = " broken"  # ends the word of a rank whose process group was aborted: it waited in vain


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Whom to watch, and how patiently.

    patience_s: after such a silence a rank, or the store, is lost
    grace_s: how long the main thread has, once it can know of a loss, to end the process by itself
    store_host: who holds the store, in words: see Mesh
    device_type: whose process groups are aborted
    """

    rank: int
    world_size: int
    store_host: str
    patience_s: float
    grace_s: float = 15.0
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("patience_s", "grace_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"must be more than 0, not {getattr(self, name)}", field=name)

    @property
    def interval_s(self) -> float:
        """How often a rank says that it lives."""
        return self.patience_s / BEATS

    @property
    def is_host(self) -> bool:
        """Whether the store ends with this process."""
        return self.store_host == f"rank {self.rank}"


class Heartbeat:
    """Says this rank's word and hears all others', once every `interval_s`, until `stop`, on a thread of its own.

    broken: whether a process group of this process failed. rounds: how often all were heard; heard: each rank's word
    then, None of ranks that said nothing yet. said_last: whether the store has this rank's last word. told: what a rank
    that raised said of itself, or of others.
    error: what the store failed with; nothing is said or heard after it.
    Only this thread blocks with a store that does not answer.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        interval_s: float,
        last_word: Callable[[], RankLost | None] = lambda: None,
        broken: Callable[[], bool] = lambda: False,
        tell: Callable[[RankLost], object] = lambda lost: None,
    ) -> None:
        self.heard: list[str | None] = [None] * world_size
        self.rounds = 0
        self.said_last = False
        self.told: RankLost | None = None
        self._hear_last_word, self._is_broken, self._tell = last_word, broken, tell
        self._untold: RankLost | None = None
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

    def tell(self, lost: RankLost, *, timeout_s: float) -> None:
        """Tell everybody at the store why this rank ends, the launcher too; wait at most so long until it is told."""
        self._untold = lost
        self._wake.set()
        with self._news:
            self._news.wait_for(lambda: self._untold is None or self.error is not None, timeout_s)

    def stop(self, *, timeout_s: float) -> None:
        """Say nothing more. Waits for a round that is under way."""
        self._stopped.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def wait_for_last_words(self, *, but: Collection[int] = (), timeout_s: float) -> None:
        """Wait, at most so long, until all others, `but` these ranks, said their last word."""
        ranks = [rank for rank in range(len(self._keys)) if rank not in (self._rank, *but)]

        def all_ended() -> bool:
            return all((self.heard[rank] or "").startswith((LEFT, LOST)) for rank in ranks)

        with self._news:
            self._news.wait_for(lambda: self.error is not None or all_ended(), timeout_s)

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
        if self._untold is not None:
            self._tell(self._untold)
            self._untold = None
        beat = f"{self.rounds + 1}{BROKEN if self._is_broken() else ''}"
        self._store.set(self._keys[self._rank], word or beat)
        self.said_last = word is not None
        # Asking for a key that is not there yet would wait for it.
        began = [rank for rank, heard in enumerate(self.heard) if heard or self._store.check([self._keys[rank]])]
        words = self._store.multi_get([self._keys[rank] for rank in began])
        heard = dict(zip(began, words, strict=True))
        self.told = self._hear_last_word()
        with self._news:
            self.heard = [heard[rank].decode() if rank in heard else None for rank in range(len(self._keys))]
            self.rounds += 1
            self._news.notify_all()


class Silence:
    """For how long each rank has said nothing new. Time in which nobody could be heard is not counted against it.

    So neither clocks need agree, nor does a pause of this process, or of the store, look like one of the others.
    """

    def __init__(self, *, world_size: int) -> None:
        self.words: list[str | None] = [None] * world_size
        self.silent_s = [0.0] * world_size

    def hear(self, words: Sequence[str | None], elapsed_s: float) -> None:
        """Take in what all ranks said last, so long after the time before. Who has yet to begin is not silent."""
        for rank, word in enumerate(words):
            still = word is not None and word != LEFT and word == self.words[rank]
            self.silent_s[rank] = self.silent_s[rank] + elapsed_s if still else 0.0
        self.words = list(words)

    def beyond(self, patience_s: float) -> list[int]:
        """Return the ranks that have been silent for longer."""
        return [rank for rank, silent_s in enumerate(self.silent_s) if silent_s > patience_s]


class Sentinel:
    """Watches from when it is made until `close`. store: a connection that nobody else uses.

    last_word: asks for what ranks that raise say before they end, tell: says what was found, over the same connection.
    error: what was found, None as long as nobody is lost. After a loss the process ends within `grace_s`, with exit
    code 1 where it does not end by itself.
    """

    def __init__(
        self,
        store: Store,
        watch: Watch,
        last_word: Callable[[], RankLost | None] = lambda: None,
        tell: Callable[[RankLost], object] = lambda lost: None,
    ) -> None:
        self.watch = watch
        self._heartbeat = Heartbeat(
            store, rank=watch.rank, world_size=watch.world_size, interval_s=watch.interval_s, last_word=last_word,
            broken=self._broken, tell=tell,
        )  # fmt: skip
        self._silence = Silence(world_size=watch.world_size)
        self._rounds, self._mute_s, self._broken_s = 0, 0.0, 0.0
        self.error: RankLost | None = None
        self._found, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="sparsering-sentinel", daemon=True)
        self._aborts: list[threading.Thread] = []
        self._thread.start()
        # A thread that comes back from C++ into an interpreter that is going takes the process down by a signal.
        atexit.register(self._end_threads)

    def check(self) -> None:
        """Raise RankLost when ranks are lost; when a process group failed, as soon as it is clear whether any are."""
        error = self.verdict(wait=self.error is None and self._broken())
        if error is not None:
            raise error

    def verdict(self, *, wait: bool) -> RankLost | None:
        """Return what was found; wait: where nothing was, give a rank that just died the time to be missed."""
        if wait:
            self._found.wait(2.5 * self.watch.patience_s)
        return self.error

    def say_goodbye(self) -> None:
        """Tell the others that this rank ends in order, so that its silence is no loss. It still watches."""
        self._heartbeat.say(LEFT, timeout_s=self.watch.patience_s)

    def close(self) -> None:
        """Stop watching. The rank that hosts the store stays, at most `patience_s`, until the others said goodbye."""
        self._closing.set()
        if self.error is None and self.watch.is_host and self._heartbeat.said_last:
            self._heartbeat.wait_for_last_words(timeout_s=self.watch.patience_s)
        self._end_threads()

    def _end_threads(self) -> None:
        """Let the threads end, but for the one that sees to the end of this process after a loss."""
        self._closing.set()
        self._heartbeat.stop(timeout_s=self.watch.interval_s)
        if self.error is None:
            self._thread.join(self.watch.interval_s)
        else:
            self._found.wait(self.watch.interval_s)
        for thread in self._aborts:
            thread.join(self.watch.grace_s)

    def _serve(self) -> None:
        before = time.monotonic()
        while not self._closing.wait(self.watch.interval_s):
            now = time.monotonic()
            found = self._judge(now - before)
            if found is not None:
                self._deliver(found)
            before = now

    def _judge(self, elapsed_s: float) -> RankLost | None:
        heartbeat, watch = self._heartbeat, self.watch
        if heartbeat.error is not None or self._mute_s > watch.patience_s:
            return self._without_store(heartbeat.error)
        elapsed_s = min(elapsed_s, 2 * watch.interval_s)  # more passed only where this process stood still
        self._broken_s = self._broken_s + elapsed_s if self._broken() else 0.0
        if heartbeat.rounds == self._rounds:
            self._mute_s += elapsed_s
            return None
        self._silence.hear(heartbeat.heard, min(self._mute_s + elapsed_s, 2 * watch.interval_s))
        self._rounds, self._mute_s = heartbeat.rounds, 0.0
        return self._of_ranks()

    def _of_ranks(self) -> RankLost | None:
        """Judge by what was heard. What another rank found comes first: all name the same ranks."""
        if self._heartbeat.told is not None:
            return self._heartbeat.told
        watch, because = self.watch, f"no heartbeat for {self.watch.patience_s:g} s"
        for teller, word in enumerate(self._silence.words):
            if word is not None and word.startswith(LOST):
                told = [int(rank) for rank in word.removeprefix(LOST).split(",")]
                return ranks_lost(told, watch.world_size, seen_by=f"rank {teller}", because=because)
        if self._silence.beyond(watch.patience_s):
            silent = self._silence.beyond(watch.patience_s / 2)  # who died with it may have been heard a beat longer
            return ranks_lost(silent, watch.world_size, seen_by=f"rank {watch.rank}", because=because)
        if self._broken_s > watch.patience_s + 2 * watch.interval_s:
            aborted = "a process group was aborted by its watchdog"
            words = self._silence.words
            came_late = [rank for rank, word in enumerate(words) if word and word != LEFT and not word.endswith(BROKEN)]
            if not came_late:
                return nobody_lost(watch.rank, because=aborted)
            seen_by = f"rank {watch.rank}"
            error = late(dict.fromkeys(came_late, ""), watch.world_size, seen_by=seen_by, because=aborted)
            error.ranks = ()  # all whose groups are aborted find it by themselves
            return error
        return None

    def _without_store(self, error: Exception | None) -> RankLost | None:
        watch = self.watch
        if watch.store_host.startswith("rank") and self._heartbeat.heard[0] == LEFT:
            self._closing.set()  # in order, and nobody can be heard any more
            return None
        because = f"no answer for {watch.patience_s:g} s" if error is None else str(error).partition("\n")[0]
        return host_lost(watch.store_host, watch.world_size, seen_by=f"rank {watch.rank}", because=because)

    def _deliver(self, error: RankLost) -> None:
        """Tell the other ranks, then the main thread; free it; end the process when it does not end."""
        watch = self.watch
        self._heartbeat.tell(error, timeout_s=2 * watch.interval_s)
        if error.ranks:
            word = LOST + ",".join(map(str, error.ranks))
            self._heartbeat.say(word, timeout_s=2 * watch.interval_s)
            if watch.is_host:  # once this process ends, the others would take it for the lost one
                self._heartbeat.wait_for_last_words(but=error.ranks, timeout_s=BEATS / 2 * watch.interval_s)
        if self._closing.is_set():
            return  # the main thread has left meanwhile
        self.error = error  # before the main thread comes back, which must not believe what it then holds
        # A thread without Python ends the process even where an abort never gives the interpreter back.
        faulthandler.dump_traceback_later(2 * watch.grace_s, exit=True, file=STDERR)
        # Each on a thread of its own: it may wait for the device, which the abort of another group sets free.
        for group in _process_groups() if watch.device_type == "cuda" else ():
            thread = threading.Thread(target=_abort, args=(group,), name="sparsering-abort", daemon=True)
            thread.start()
            self._aborts.append(thread)
        self._found.set()
        time.sleep(watch.grace_s)
        os.write(STDERR, f"sparsering: {error}\n".encode())
        os._exit(1)

    def _broken(self) -> bool:
        """Whether torch's watchdog aborted a process group: what its receivers hold then is not what was sent."""
        return self.watch.device_type == "cuda" and any(map(_has_failed, _process_groups()))


def _process_groups() -> list[dist.ProcessGroup]:
    """Return all process groups of this process, whoever made them. torch has no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)


def _has_failed(group: dist.ProcessGroup) -> bool:
    try:
        return group._get_backend(torch.device("cuda")).get_error().name != "SUCCESS"
    except (RuntimeError, AttributeError):  # it has no such backend, or this torch does not tell
        return False


def _abort(group: dist.ProcessGroup) -> None:
    try:
        group.abort()
    except RuntimeError as error:  # the process ends anyway; this is for whoever looks why it took the grace
        os.write(STDERR, f"sparsering: aborting a process group: {str(error).partition(chr(10))[0]}\n".encode())
