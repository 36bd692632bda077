"""Joining the other ranks: the only place in the runtime that reads environment variables.

Ranks agree on the plan through the store (no collective) before anything else is sent. When one fails, the others must
end with an error that names it, not hang and not guess.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from ...traces.errors import InputError, unknown_name
from .group import Mesh, told_by_all, words_of
from .lost import RankLost, is_symptom
from .parting import close, part
from .place import Place, connection_of_its_own, open_store
from .roll_call import roll_call
from .sentinel import Sentinel, Watch
from .tied import end_with
from .words import Words, attempt_prefix

WORD_S = 10.0  # in which a host's first rank says what its others would say too
AT_ONCE_S = 1.0  # how long a rank that cannot begin looks for a store to say so

# This process's own, as its process group is: `leave` ends them all.
_sentinels: list[Sentinel] = []
_words: list[Words] = []
_joins = itertools.count(1)  # all ranks join equally often
_said: list[BaseException] = []  # why this process ends, once it was told to the others
_endings: list[Callable[[], None]] = []


def inherited_environment(*, world_size: int) -> dict[str, str]:
    """Return the environment for ranks that this process starts: its own, the cores shared out among them."""
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)


def is_rank() -> bool:
    """Whether this process was started as one rank of several (RANK and WORLD_SIZE are set)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks(problem: str, *, at_once: bool = False) -> bool:
    """Return whether this process is to say why it ends: a rank that is not its host's first one lets that one speak.

    Ranks read the same files, so most of what is wrong is the same for all. Another rank waits WORD_S; the launcher
    ends it once the first one has ended. A rank that lives on has a problem of its own, and says it. at_once: it is
    the same for all, certainly. Ranks that have joined, and wait for this one, are told the problem.
    """
    if not is_rank():
        return True
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    began = time.monotonic()
    if not at_once:
        _tell(InputError(problem), wait_s=AT_ONCE_S if first else WORD_S)
    if not first and not at_once:
        time.sleep(max(0.0, WORD_S - (time.monotonic() - began)))
    return first or not at_once


def _tell(error: Exception, *, wait_s: float) -> None:
    """Say why this rank cannot begin to those that wait for it: at the launcher's store, or rank 0's."""
    if _said:
        return
    with suppress(InputError, RankLost, dist.DistError, RuntimeError):
        place = Place.parsed(os.environ, launcher_hosts=_launcher_hosts())
        store = PrefixStore(_prefix(1), open_store(place, timeout_s=WORD_S, wait_s=wait_s))
        words = Words(store, rank=place.rank, world_size=place.world_size, store_host=_host())
        words.say(error)
        atexit.register(words.stay)  # until those have read it who come yet


def join_or_be_alone(*, device: str | None, timeout_s: float) -> Mesh:
    """Join as `join` does where this process was started as a rank; else be the only rank.

    The environment stays as it is: what this process starts or does later was not started as a rank either.
    """
    if not is_rank() and not dist.is_initialized():
        kind = device or usual_device()
        _start_groups(kind, _device(kind, 0), HashStore(), rank=0, world_size=1, timeout_s=timeout_s)
    return join(device=device, timeout_s=timeout_s)


def join(*, device: str | None = None, timeout_s: float = 600.0, patience_s: float | None = 0.0) -> Mesh:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT describe, or the one that exists.

    device: "cpu" or "cuda"; the default is CUDA where there is one. patience_s: after how long a silence a rank is lost
    (sentinel.py), less than timeout_s; 0 watches nobody, None stands for `usual_patience_s`. InputError when the
    environment is incomplete.
    """
    kind = device or usual_device()
    if patience_s is None:
        patience_s = usual_patience_s(kind, timeout_s)
    check_patience(patience_s, timeout_s)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())  # torchrun, which may be killed
    prefix = _prefix(next(_joins))
    if dist.is_initialized():
        store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        words = Words(store, rank=rank, world_size=world_size, store_host=_host(), timeout_s=timeout_s)
        chosen = _device(kind, int(os.environ.get("LOCAL_RANK", rank)))
    else:
        words = _meet(prefix, timeout_s)
        if kind == "cuda" and patience_s:
            # "Clean up only": torch's watchdog aborts what fails, the sentinel says who is lost and ends the process.
            # By default the watchdog would end it first, and by std::terminate.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        chosen = _begun(words, kind, timeout_s)
    for earlier in _words:
        earlier.stop()
    _words[:] = [words]
    if words.world_size > 1:
        words.answer(connection_of_its_own(words.store))
    if patience_s and words.world_size > 1 and not _sentinels:
        _watch(words, prefix, chosen.type, patience_s)
    atexit.unregister(_end_unleft)
    atexit.register(_end_unleft)  # anew: what is registered last is called first, and it needs the other threads
    return Mesh(
        rank=words.rank, world_size=words.world_size, device=chosen, store=words.store,
        timeout=timedelta(seconds=timeout_s), store_host=_host(), sentinel=_sentinels[0] if _sentinels else None,
        words=words,
    )  # fmt: skip


def _meet(prefix: str, timeout_s: float) -> Words:
    """Meet the other ranks where the environment says. InputError when it is incomplete, or the port is no store's."""
    place = Place.parsed(os.environ, launcher_hosts=_launcher_hosts())
    store = PrefixStore(prefix, open_store(place, timeout_s=timeout_s))
    store.set_timeout(timedelta(seconds=timeout_s))
    return Words(store, rank=place.rank, world_size=place.world_size, store_host=_host(), timeout_s=timeout_s)


def _begun(words: Words, kind: str, timeout_s: float) -> torch.device:
    """Call the roll and start the process group; return this rank's device. What fails is told to the others."""
    try:
        roll_call(words, timeout_s=timeout_s)
        if words.world_size > 1:  # before torch waits for others, which hears nobody
            words.answer(connection_of_its_own(words.store))
        device = _device(kind, int(os.environ.get("LOCAL_RANK", words.rank)))
        _start_groups(kind, device, words.store, rank=words.rank, world_size=words.world_size, timeout_s=timeout_s)
    except BaseException as error:
        is_loss = is_symptom(error) and not isinstance(error, RankLost)
        told = words.survivors(range(words.world_size), error) if is_loss else error
        _said.append(told)
        words.say(told)
        words.end()
        words.stay()  # who comes late finds the store, and ends alike
        words.stop()
        raise told from (error if is_loss else None)
    return device


def _watch(words: Words, prefix: str, device_type: str, patience_s: float) -> None:
    connection = connection_of_its_own(words.store)
    if connection is None:  # the store is of another kind
        return
    watch = Watch(rank=words.rank, world_size=words.world_size, store_host=words.store_host, patience_s=patience_s,
                  device_type=device_type)  # fmt: skip
    over = words.over(connection)
    store = PrefixStore(f"sparsering/sentinel/{prefix}", connection)
    _sentinels.append(Sentinel(store, watch, last_word=over.heard, tell=over.find))


def _launcher_hosts() -> bool:
    """Whether a launcher holds the store: torchrun's agent says so to its workers, and `start_ranks` likewise."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _host() -> str:
    return "the launcher" if _launcher_hosts() else "rank 0"


def usual_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _start_groups(
    kind: str, device: torch.device, store: Store, *, rank: int, world_size: int, timeout_s: float
) -> None:
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=PrefixStore("default", store), rank=rank, world_size=world_size,
        timeout=timedelta(seconds=timeout_s), device_id=device if kind == "cuda" else None,
    )  # fmt: skip


def usual_patience_s(device_type: str, timeout_s: float) -> float:
    """Return half of the time-out on GPUs, where nobody else says who died; 0 on CPUs: gloo notices at once."""
    return timeout_s / 2 if device_type == "cuda" else 0.0


def check_patience(patience_s: float | None, timeout_s: float) -> None:
    """Raise InputError unless a silence is noticed before the time-out. None: as `join` has it, which it is."""
    if patience_s is not None and not 0 <= patience_s < timeout_s:
        raise InputError(f"{patience_s:g} s is not between 0 and the time-out, {timeout_s:g} s", field="patience_s")


def _prefix(join: int) -> str:
    """Return what the store's keys begin with: launchers keep their store for the next attempt, and the next join."""
    return attempt_prefix(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), join)


def at_leave(ending: Callable[[], None]) -> None:
    """Have `leave` call this before it ends the process group."""
    _endings.append(ending)


def leave() -> None:
    """Leave the process group, if there is one, once all ranks do, and say goodbye to the others.

    RankLost names ranks that are lost meanwhile, or do not come within the time-out. While an error is on its way out
    (in a `finally`) nobody is waited for, and there is no goodbye: the others are told the error.
    """
    _leave(sys.exc_info()[1])


def _end_unleft() -> None:
    """End a process that joined and did not `leave`, as a script does whose error nobody caught.

    The host's store stays until the others have read why: else they would name the host, which only came to know first.
    """
    if not _words:
        return
    error: BaseException | None = getattr(sys, "last_value", None)
    if error is not None:
        _leave(error)
    elif not _sentinels:  # who watches takes the silence for a loss, as it may be: nobody knows why this one exits
        _words[0].end()


def _leave(error: BaseException | None) -> None:
    gc.collect()  # what holds a process group in a cycle (DDP, Trainers) would end it later, when nobody else does
    sentinel = _sentinels.pop() if _sentinels else None
    words = _words.pop() if _words else None
    if words is not None and error is not None and (sentinel is None or sentinel.error is None):
        _said.append(error)
        words.say(error)
    lost = None
    if words is not None and error is None and (sentinel is None or sentinel.error is None):
        error = lost = part(words, timeout_s=words.timeout_s)
    if sentinel is not None and error is not None:
        sentinel.close()
    elif sentinel is not None:
        sentinel.say_goodbye()
    endings, _endings[:] = list(_endings), []
    for end in () if error is not None else endings:  # what failed may never end in order
        end()
    # Aborted groups may never end in order, nor may those on GPUs without a lost rank.
    if dist.is_initialized() and (sentinel is None or (sentinel.error is None and lost is None)):
        dist.destroy_process_group()
    if sentinel is not None and error is None:
        sentinel.close()
    if words is not None and error is None:
        lost = close(words)
    elif words is not None and (sentinel is None or sentinel.error is None):
        words.end()
    if words is not None:
        words.stop()
    if lost is not None:
        raise lost


def agree(mesh: Mesh, topic: str, value: str) -> None:
    """Compare `value` with every rank's; InputError names the first rank that differs. See `told_by_all`."""
    values = told_by_all(mesh, topic, value, what=topic)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise InputError(f"rank {rank} has {other[:16]}, rank 0 has {values[0][:16]}", field=topic)


def name_lost_ranks(mesh: Mesh, topic: str, error: BaseException) -> RankLost:
    """Return an error that names the ranks of this mesh that are gone, after a failed communication about the topic.

    See `Words.survivors`.
    """
    return words_of(mesh).survivors([mesh.process(rank) for rank in range(mesh.world_size)], f"{topic}: {error}")


@contextmanager
def naming_lost_ranks(mesh: Mesh) -> Iterator[None]:
    """Raise RankLost where a lost rank makes what is inside fail, or end with what nobody sent.

    For errors that a rank's death may look like, waits until it is clear whether one is lost; others pass at once.
    """
    sentinel = mesh.sentinel
    if sentinel is not None:
        sentinel.check()
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        lost = _behind(mesh, error)
        if lost is None:
            raise
        raise lost from error
    if sentinel is not None:
        sentinel.check()


def _behind(mesh: Mesh, error: RuntimeError) -> RankLost | None:
    """Return the loss of ranks that is behind an error; None where the error is this rank's own."""
    if mesh.sentinel is not None and mesh.device.type == "cuda":
        return mesh.sentinel.verdict(wait=is_symptom(error))
    if mesh.sentinel is not None and mesh.sentinel.error is not None:
        return mesh.sentinel.error
    if mesh.world_size == 1 or not is_symptom(error):
        return None
    return name_lost_ranks(mesh, "work", error)


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise unknown_name(kind, ("cpu", "cuda"), field="device")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} has no GPU; there are {torch.cuda.device_count()}", field="device")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
