"""One process among its peers, and what it asks of them through the store."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from ...traces.errors import InputError
from .sentinel import Sentinel
from .words import Words


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process among its peers: its rank, its device, and the store that all share.

    store_host: who holds the store, in words: without it nobody can ask who is left
    sentinel: who watches the other processes; None where nobody does
    words: what is said of ranks that end, to all processes
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
    words: Words | None = None

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

    def new_group(self, ranks: Sequence[int], *, backend: str | None = None) -> dist.ProcessGroup | None:
        """Return a process group of these ranks of this replica, None on others. Collective over all replicas.

        backend: NCCL on GPUs, gloo elsewhere, unless given.
        """
        own, backend = None, backend or ("nccl" if self.device.type == "cuda" else "gloo")
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
        return (
            None
            if self.rank
            else [json.loads(_awaited(self, key, rank=rank, what=topic)) for rank, key in enumerate(keys)]
        )

    def broadcast(self, topic: str, value: Any) -> Any:
        """Return rank 0's JSON value on every rank, through the store. `topic` must be new."""
        key = f"sparsering/broadcast/{topic}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        return json.loads(_awaited(self, key, rank=0, what=topic))


def told_by_all(mesh: Mesh, topic: str, value: Any, *, what: str) -> list[Any]:
    """Say a JSON value to all ranks through the store, and return that of each. topic must be new for every call.

    RankLost names a rank that says nothing within the time-out, or ranks that are lost, or have ended.
    """
    began, timeout_s = time.monotonic(), mesh.timeout.total_seconds()
    keys = [f"sparsering/{topic}/{rank}" for rank in range(mesh.world_size)]
    mesh.store.set(keys[mesh.rank], json.dumps(value))
    values: list[Any] = []
    for rank, key in enumerate(keys):
        left = timeout_s - (time.monotonic() - began)
        values.append(json.loads(_awaited(mesh, key, rank=rank, what=what, timeout_s=left)))
    return values


def _awaited(mesh: Mesh, key: str, *, rank: int, what: str, timeout_s: float | None = None) -> bytes:
    """Return what a rank says at a key of the mesh's store.

    RankLost, the same on all ranks, when it says nothing within the time-out, or when ranks are lost or have ended.
    """
    words, patience_s = words_of(mesh), mesh.timeout.total_seconds()
    deadline = time.monotonic() + (patience_s if timeout_s is None else timeout_s)
    if not words.wait(mesh.store, key, deadline):
        lost = mesh.sentinel.error if mesh.sentinel is not None else None
        raise lost or words.missed(mesh.process(rank), f"nothing was heard of its {what} for {patience_s:g} s")
    return mesh.store.get(key)


def words_of(mesh: Mesh) -> Words:
    """Return what is said of ranks that end; of this mesh's alone where nobody joined it."""
    if mesh.words is not None:
        return mesh.words
    return Words(mesh.store, rank=mesh.rank, world_size=mesh.world_size, store_host=mesh.store_host)
