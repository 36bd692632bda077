"""Pulls: a rank's copy engine fetches from memory of its peers, and no multiprocessor is taken from kernels.

The memory is torch's symmetric memory: every rank allocates as much, in the same order, and maps that of all others. A
peer's part of it is a tensor of the own device, so that `copy_` between contiguous parts of one type is one
cudaMemcpyAsync (`copy_device_to_device` in torch's Copy.cu), which a copy engine carries out. All ranks share a host.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...traces.errors import InputError
from .group import Mesh, told_by_all

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PAD_BYTES = 16
_questions = count()  # ranks ask in the same order


class Pull(NamedTuple):
    """Copy `origin`, which lies on rank `source`, to `target`: contiguous, of one type and shape."""

    source: int
    target: Tensor
    origin: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """Ready and done between every two ranks that exchange data in a group call of one communicator.

    pad: torch's handle of symmetric memory, with one flag for every (channel, rank of the mesh that puts, rank that
    waits). `put_signal` sets it, after everything before on the current stream, and first waits until it is not set;
    `wait_signal` waits for it there and takes it away. ready, done: channels.

    Why this cannot deadlock, and never puts a flag that is still set: in a schedule that `check_order` accepts, the
    calls of two ranks that exchange meet one to one, in the same order on both, and calls that meet, with all that
    those meet, may begin together. Every call first says ready to its readers, which waits for nobody: the reader took
    the flag of their last call before it said done, and that call waited for this. Then the call waits for its sources'
    ready, which each says at its own beginning, and says done, whose last flag the source took before it said ready.
    At the end it waits for its readers' done, which need no more than what has been said by then. A rank without a part
    in a call is not waited for: plans that leave pairs out give ranks different numbers of calls, on which barriers of
    all ranks would hang. On a channel's stream calls run one after the other, as NCCL's do; kernels wait for the end of
    a call where the plan says so, and for nothing else.
    """

    pad: Any
    ready: int
    done: int
    timeout_ms: int

    def exchange(self, *, readers: Sequence[int], pulls: Sequence[Pull]) -> None:
        """Enqueue one group call on the current stream: let `readers` pull from here, and carry out the own pulls.

        A rank that never comes ends the wait, and this process's use of the GPU, with an error after the timeout.
        """
        distinct = list(dict.fromkeys(readers))  # one signal for all transfers between two ranks
        for reader in distinct:
            self.pad.put_signal(reader, channel=self.ready, timeout_ms=self.timeout_ms)
        for source in dict.fromkeys(pull.source for pull in pulls):
            self.pad.wait_signal(source, channel=self.ready, timeout_ms=self.timeout_ms)
            for pull in pulls:
                if pull.source == source:
                    assert pull.origin is not None, "the source's memory cannot be read"
                    pull.target.copy_(pull.origin, non_blocking=True)
            self.pad.put_signal(source, channel=self.done, timeout_ms=self.timeout_ms)
        for reader in distinct:
            self.pad.wait_signal(reader, channel=self.done, timeout_ms=self.timeout_ms)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """Bytes of this rank. handle: given where all ranks have as many, which each of them can read."""

    memory: Tensor
    handle: Any = None

    def of_peer(self, part: Tensor, peer: int) -> Tensor | None:
        """Return what lies on rank `peer` where the contiguous `part` lies here; None where it cannot be read."""
        if self.handle is None:
            return None
        offset_bytes = part.data_ptr() - self.memory.data_ptr()
        assert 0 <= offset_bytes <= self.memory.nbytes - part.nbytes and part.is_contiguous()
        assert offset_bytes % part.element_size() == 0
        return self.handle.get_buffer(peer, part.shape, part.dtype, offset_bytes // part.element_size())


class PeerMemory:
    """Memory of all ranks of a mesh that each of them can read. Making it, and allocating, is collective."""

    def __init__(self, mesh: Mesh) -> None:
        group = mesh.new_group(range(mesh.world_size))
        assert group is not None
        self._mesh, self._group = mesh, group
        self._pad = self.allocate(PAD_BYTES)
        self._warm_up()

    def allocate(self, nbytes: int) -> Arena:
        """Return `nbytes` of symmetric memory: the same number on all ranks. Waits for them, not for the device.

        Not by `symm_mem.empty`, whose memory pool may put two tensors into one allocation: `get_buffer` counts from the
        allocation's beginning, and its signals would be shared.
        """
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed import _symmetric_memory

        device = self._mesh.device
        if _symmetric_memory.get_backend(device) != "CUDA":
            _symmetric_memory.set_backend("CUDA")
        memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        handle = _symmetric_memory.rendezvous(memory, self._group)
        assert (handle.rank, handle.world_size) == (self._mesh.rank, self._mesh.world_size)
        assert handle.buffer_ptrs[handle.rank] == memory.data_ptr(), "not the beginning of an allocation"
        return Arena(memory=memory, handle=handle)

    def signals(self, number: int) -> Signals:
        """Return the signals of communicator `number`, which all ranks count alike."""
        timeout_ms = int(self._mesh.timeout.total_seconds() * 1e3)
        return Signals(pad=self._pad.handle, ready=2 * number, done=2 * number + 1, timeout_ms=timeout_ms)

    def _warm_up(self) -> None:
        """Pull once around the ring: a kernel that is loaded while another one waits for a peer may wait for it too."""
        rank, world_size = self._mesh.rank, self._mesh.world_size
        following, previous = (rank + 1) % world_size, (rank - 1) % world_size
        origin = self._pad.of_peer(self._pad.memory, following)
        pull = Pull(following, torch.empty_like(self._pad.memory), origin)
        self.signals(0).exchange(readers=[previous], pulls=[pull])
        torch.cuda.synchronize(self._mesh.device)


def require_peer_access(mesh: Mesh) -> None:
    """Raise InputError, the same on all ranks, unless every rank's GPU can read every other's memory. Collective.

    Asked of the machine, and not of NCCL, whose idea of nodes can be set.
    """
    topic = f"peer access {next(_questions)}"
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    # This machine, and the container on it: ranks hand each other memory through its file system.
    own = [f"{socket.gethostname()} {boot}", str(torch.cuda.get_device_properties(mesh.device).uuid)]
    places = [(host, gpu) for host, gpu in told_by_all(mesh, topic, own, what="place")]
    problem = why_not_readable(mesh.rank, places, _has_access(mesh.device))
    problems = told_by_all(mesh, f"{topic} verdict", problem, what="place")
    for rank, problem in enumerate(problems):
        if problem:
            raise InputError(f"rank {rank} cannot pull: {problem}", field="pull")


def why_not_readable(
    rank: int, places: Sequence[tuple[str, str]], has_access: Callable[[str], bool | None]
) -> str | None:
    """Return why `rank` cannot read the memory of all others, in a few words; None when nothing speaks against it.

    places: (host, GPU) of every rank; has_access: of this GPU to another one, None where this process does not see it.
    """
    for peer, (host, gpu) in enumerate(places):
        if host != places[rank][0]:
            return f"rank {peer} is on another host"
        if peer != rank and gpu == places[rank][1]:
            return f"rank {peer} uses the same GPU"
        if peer != rank and has_access(gpu) is False:
            return f"its GPU has no access to that of rank {peer}"
    return None


def _has_access(device: torch.device) -> Callable[[str], bool | None]:
    # A rank may be started with its own GPU alone in sight: then mapping the memory says whether it works.
    visible = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(torch.cuda.device_count())}
    return lambda gpu: torch.cuda.can_device_access_peer(device, visible[gpu]) if gpu in visible else None
