"""Joining the other ranks: the only place in the runtime that reads environment variables.

Ranks agree on the plan through the store (no collective) before anything else is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from ..traces.errors import InputError

DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process among its peers: its rank, its device, and the store that all share.

    store_host: who holds the store, in words: without it nobody can ask who is left
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

    @property
    def backend(self) -> str:
        """The torch.distributed backend that moves this device's tensors."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    @property
    def hosted_by_rank(self) -> bool:
        """Whether a rank holds the store, and no launcher does."""
        return self.store_host.startswith("rank")

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
        return Mesh(
            rank=self.rank % world_size,
            world_size=world_size,
            device=self.device,
            store=PrefixStore(f"replica {replica}", self.store),
            timeout=self.timeout,
            store_host=self.store_host if replica == 0 or not self.hosted_by_rank else "rank 0 of replica 0",
            replica=replica,
            replicas=self.world_size // world_size,
        )

    def new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return a process group of these ranks of this replica, None on others. Collective over all replicas."""
        own = None
        for replica in range(self.replicas):
            processes = [replica * self.world_size + rank for rank in ranks]
            group = dist.new_group(processes, timeout=self.timeout, backend=self.backend)
            if replica == self.replica and self.rank in ranks and isinstance(group, dist.ProcessGroup):
                own = group
        return own

    def collect(self, topic: str, value: Any) -> list[Any] | None:
        """Bring a JSON value of every rank to rank 0 through the store; None elsewhere. `topic` must be new."""
        self.store.set(f"sparsering/collect/{topic}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        return [
            json.loads(self.store.get(f"sparsering/collect/{topic}/{rank}").decode()) for rank in range(self.world_size)
        ]

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


def join(*, device: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> Mesh:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT describe, or the one that exists.

    device: "cpu" or "cuda"; the default is CUDA where there is one. InputError when the environment is incomplete.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    timeout = timedelta(seconds=timeout_s)
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        return Mesh(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=_device(kind, local),
            store=store,
            timeout=timeout,
            store_host=_store_host(),
        )
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (KeyError, ValueError) as error:
        raise InputError(f"not started as a rank ({error}); use torchrun", field="environment") from error
    local = int(os.environ.get("LOCAL_RANK", rank))
    chosen = _device(kind, local)
    # torchrun keeps its store when it restarts workers: what the last attempt's ranks left there must not be read.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=PrefixStore("default", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=chosen if kind == "cuda" else None,
    )
    return Mesh(rank=rank, world_size=world_size, device=chosen, store=store, timeout=timeout, store_host=_store_host())


def _store_host() -> str:
    """torchrun's agent may hold the store (torch.distributed.elastic says so to its workers); else rank 0 does."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(mesh: Mesh, topic: str, value: str) -> None:
    """Compare `value` with every rank's through the store; InputError names the first rank that differs.

    topic must be new for every call. A rank that never says its value is named too, after the mesh's timeout.
    """
    prefix = f"sparsering/{topic}"
    mesh.store.set(f"{prefix}/{mesh.rank}", value)
    values: list[str] = []
    for rank in range(mesh.world_size):
        try:
            mesh.store.wait([f"{prefix}/{rank}"], mesh.timeout)
        except (dist.DistStoreError, RuntimeError) as error:
            raise InputError(f"rank {rank} did not say its {topic} in {mesh.timeout}", field=topic) from error
        values.append(mesh.store.get(f"{prefix}/{rank}").decode())
    for rank, other in enumerate(values):
        if other != values[0]:
            raise InputError(f"rank {rank} has {other[:16]}, rank 0 has {values[0][:16]}", field=topic)


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise InputError(f"{kind!r} is neither 'cpu' nor 'cuda'", field="device")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} has no GPU; there are {torch.cuda.device_count()}", field="device")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
