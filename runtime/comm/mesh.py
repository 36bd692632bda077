"""Joining the other ranks: the only place in the runtime that reads environment variables.

Ranks agree on the plan through the store (no collective) before anything else is sent. When one fails, the others must
end with an error that names it, not hang and not guess.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from ...traces.errors import InputError, unknown_name
from .lost import SYMPTOMS, CommunicationError, RankLost, host_lost, nobody_lost, ranks_lost
from .sentinel import Sentinel, Watch, connection_of_its_own

GRACE = timedelta(seconds=5)
WORD_S = 10.0  # in which a host's first rank says what its others would say too

# This process's own, as its process group is: `leave` ends them all.
_sentinels: list[Sentinel] = []
_endings: list[Callable[[], None]] = []


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process among its peers: its rank, its device, and the store that all share.

    store_host: who holds the store, in words: without it nobody can ask who is left
    sentinel: who watches the other processes; None where nobody does
    replica, replicas: of so many groups of `world_size` consecutive processes that do the same on other data, this one
    """

    rank: int
    world_size: int
    device: torch.device
    store: Store
    timeout: timedelta
    store_host: str = "rank 0"
    replica: int = 0
    replicas: int = 1
    sentinel: Sentinel | None = None

    def process(self, rank: int) -> int:
        """Return the number of this replica's rank among all processes."""
        return self.replica * self.world_size + rank

    def replica_of(self, world_size: int) -> Mesh:
        """Return this process's mesh when all processes split into replicas of `world_size` consecutive ones.

        Raises InputError when they do not.
        """
        if self.replicas != 1 or world_size < 1 or self.world_size % world_size:
            raise InputError(f"{self.world_size} processes are no groups of {world_size}", field="world_size")
        replica = self.rank // world_size
        host = "rank 0 of replica 0" if replica and self.store_host.startswith("rank") else self.store_host
        return replace(
            self, rank=self.rank % world_size, world_size=world_size, replica=replica,
            replicas=self.world_size // world_size, store=PrefixStore(f"replica {replica}", self.store),
            store_host=host,
        )  # fmt: skip

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return a process group of these ranks of this replica, None on others. Collective over all replicas."""
        own, backend = None, "nccl" if self.device.type == "cuda" else "gloo"
        for replica in range(self.replicas):
            processes = [replica * self.world_size + rank for rank in ranks]
            group = dist.new_group(processes, timeout=self.timeout, backend=backend)
            if replica == self.replica and self.rank in ranks and isinstance(group, dist.ProcessGroup):
                own = group
        return own

    def check(self) -> None:
        """Raise RankLost when the sentinel knows of lost ranks. Before anything is kept that came from others."""
        if self.sentinel is not None:
            self.sentinel.check()

    def collect(self, topic: str, value: Any) -> list[Any] | None:
        """Bring a JSON value of every rank to rank 0 through the store; None elsewhere. `topic` must be new."""
        keys = [f"sparsering/collect/{topic}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], json.dumps(value))
        return None if self.rank else [json.loads(self.store.get(key).decode()) for key in keys]

    def broadcast(self, topic: str, value: Any) -> Any:
        """Return rank 0's JSON value on every rank, through the store. `topic` must be new."""
        key = f"sparsering/broadcast/{topic}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key).decode())


def inherited_environment(*, world_size: int) -> dict[str, str]:
    """Return the environment for ranks that this process starts: its own, the cores shared out among them."""
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)


def is_rank() -> bool:
    """Whether this process was started as one rank of several (RANK and WORLD_SIZE are set)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks(*, at_once: bool = False) -> bool:
    """Return whether this process is to say why it ends: a rank that is not its host's first one lets that one speak.

    Ranks read the same files, so most of what is wrong is the same for all. Another rank waits WORD_S; the launcher
    ends it once the first one has ended. A rank that lives on has a problem of its own, and says it. at_once: it is
    the same for all, certainly.
    """
    if not is_rank() or os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    if not at_once:
        time.sleep(WORD_S)
    return not at_once


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
    timeout = timedelta(seconds=timeout_s)
    if dist.is_initialized():
        store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        chosen = _device(kind, int(os.environ.get("LOCAL_RANK", rank)))
    else:
        store, rank, world_size = _rendezvous(timeout)
        chosen = _device(kind, int(os.environ.get("LOCAL_RANK", rank)))
        if kind == "cuda" and patience_s:
            # "Clean up only": torch's watchdog aborts what fails, the sentinel says who is lost and ends the process.
            # By default the watchdog would end it first, and by std::terminate.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        _start_groups(kind, chosen, store, rank=rank, world_size=world_size, timeout_s=timeout_s)
    # torchrun's agent may hold the store (torch.distributed.elastic says so to its workers); else rank 0 does.
    host = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    if patience_s and world_size > 1 and not _sentinels:
        watch = Watch(rank=rank, world_size=world_size, store_host=host, patience_s=patience_s, device_type=chosen.type)
        connection = connection_of_its_own(store, timeout)  # None where the store is of another kind
        if connection is not None:
            _sentinels.append(Sentinel(PrefixStore(f"sparsering/sentinel/{_attempt()}", connection), watch))
    return Mesh(
        rank=rank, world_size=world_size, device=chosen, store=store, timeout=timeout, store_host=host,
        sentinel=_sentinels[0] if _sentinels else None,
    )  # fmt: skip


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


def _rendezvous(timeout: timedelta) -> tuple[Store, int, int]:
    """Return (store, rank, world size) as the environment says. InputError when it is incomplete."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (KeyError, ValueError) as error:
        raise InputError(f"not started as a rank ({error}); use torchrun", field="environment") from error
    # torchrun keeps its store when it restarts workers: what the last attempt's ranks left there must not be read.
    store = PrefixStore(_attempt(), store)
    store.set_timeout(timeout)
    return store, rank, world_size


def usual_patience_s(device_type: str, timeout_s: float) -> float:
    """Return half of the time-out on GPUs, where nobody else says who died; 0 on CPUs: gloo notices at once."""
    return timeout_s / 2 if device_type == "cuda" else 0.0


def check_patience(patience_s: float | None, timeout_s: float) -> None:
    """Raise InputError unless a silence is noticed before the time-out. None: as `join` has it, which it is."""
    if patience_s is not None and not 0 <= patience_s < timeout_s:
        raise InputError(f"{patience_s:g} s is not between 0 and the time-out, {timeout_s:g} s", field="patience_s")


def _attempt() -> str:
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def at_leave(ending: Callable[[], None]) -> None:
    """Have `leave` call this before it ends the process group."""
    _endings.append(ending)


def leave() -> None:
    """Leave the process group, if there is one, and say goodbye to the others.

    While an error is on its way out (in a `finally`) there is no goodbye: the others, who wait for this rank, lose it.
    """
    gc.collect()  # what holds a process group in a cycle (DDP, Trainers) would end it later, when nobody else does
    sentinel = _sentinels.pop() if _sentinels else None
    failing = sys.exc_info()[1] is not None
    if sentinel is not None and failing:
        sentinel.close()
    elif sentinel is not None:
        sentinel.say_goodbye()
    endings, _endings[:] = list(_endings), []
    for end in () if failing else endings:  # what failed may never end in order
        end()
    if dist.is_initialized() and (sentinel is None or sentinel.error is None):  # aborted groups may never end in order
        dist.destroy_process_group()
    if sentinel is not None and not failing:
        sentinel.close()


def agree(mesh: Mesh, topic: str, value: str) -> None:
    """Compare `value` with every rank's; InputError names the first rank that differs. See `told_by_all`."""
    values = told_by_all(mesh, topic, value, what=topic, field=topic)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise InputError(f"rank {rank} has {other[:16]}, rank 0 has {values[0][:16]}", field=topic)


def told_by_all(mesh: Mesh, topic: str, value: Any, *, what: str, field: str) -> list[Any]:
    """Say a JSON value to all ranks through the store, and return that of each. topic must be new for every call.

    InputError, with `what` as the word for it, names a rank that never says its own, after the mesh's timeout; with a
    sentinel, RankLost names ranks that are lost.
    """
    prefix = f"sparsering/{topic}"
    mesh.store.set(f"{prefix}/{mesh.rank}", json.dumps(value))
    values: list[Any] = []
    for rank in range(mesh.world_size):
        try:
            mesh.store.wait([f"{prefix}/{rank}"], mesh.timeout)
        except (dist.DistStoreError, RuntimeError) as error:
            lost = mesh.sentinel.verdict(wait=True) if mesh.sentinel is not None else None
            if lost is not None:
                raise lost from error
            raise InputError(f"rank {rank} did not say its {what} in {mesh.timeout}", field=field) from error
        values.append(json.loads(mesh.store.get(f"{prefix}/{rank}").decode()))
    return values


def name_lost_ranks(mesh: Mesh, topic: str, error: CommunicationError) -> RankLost:
    """Return an error that names the ranks that are gone, after a failed communication.

    Every survivor signs in at the store and gives the others GRACE to do so: whoever does not is lost. When all sign
    in, nobody died: a rank was late beyond the time-out, or a link failed, and the error says what was being sent.
    When the store itself cannot be reached, whoever hosts it is lost. `topic` is the same on all ranks.
    """
    prefix = f"sparsering/survivors/{topic}"
    seen_by = f"rank {mesh.rank}"
    lost: list[int] = []
    try:
        mesh.store.set(f"{prefix}/{mesh.rank}", "here")
        for rank in range(mesh.world_size):
            key = f"{prefix}/{rank}"
            if not lost:
                with suppress(dist.DistStoreError, RuntimeError):
                    mesh.store.wait([key], GRACE)
            if not mesh.store.check([key]):  # raises when the store itself is gone
                lost.append(rank)
    except (dist.DistError, RuntimeError):
        return host_lost(mesh.store_host, mesh.world_size, seen_by=seen_by, because=error)
    if not lost:
        return nobody_lost(mesh.rank, because=error)
    return ranks_lost(lost, mesh.world_size, seen_by=seen_by, because=error)


@contextmanager
def naming_lost_ranks(mesh: Mesh) -> Iterator[None]:
    """Raise RankLost where a lost rank makes what is inside fail, or end with what nobody sent.

    For errors that a rank's death may look like, waits until the sentinel can tell; others pass at once, and so does
    everything where no sentinel watches.
    """
    sentinel = mesh.sentinel
    if sentinel is None:
        yield
        return
    sentinel.check()
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        lost = sentinel.verdict(wait=isinstance(error, SYMPTOMS))
        if lost is None:
            raise
        raise lost from error
    sentinel.check()


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise unknown_name(kind, ("cpu", "cuda"), field="device")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} has no GPU; there are {torch.cuda.device_count()}", field="device")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
