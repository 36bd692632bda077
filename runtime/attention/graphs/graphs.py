"""Functions of tensors as CUDA graphs: recorded once for all calls of one key, then replayed on other tensors.

A layer of attention is dozens of launches, which cost the host milliseconds, whatever they compute; a graph of them
costs it microseconds. A recording reads and writes its own tensors, so that inputs are copied to it and results from
it: that pays where layers are short. Nothing here knows what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ....traces.errors import UnsupportedError
from .endings import end_before_groups

EAGER_CALLS = 2  # of every key, before it is recorded: kernels are compiled and tables made in them
Inputs = Mapping[str, Tensor | None]
Outputs = tuple[Tensor | None, ...]
Compute = Callable[[Inputs], Outputs]


class Recording(Protocol):
    """Work that was recorded: it reads the tensors that it was recorded with, and fills those of `outputs`."""

    @property
    def outputs(self) -> Outputs:
        """What the function returned; overwritten by every replay."""
        ...

    def replay(self) -> None:
        """Do the work again. On GPUs it is enqueued on the current stream."""
        ...

    def drop(self) -> None:
        """Let go of the work, not of `outputs`: it is not replayed any more."""
        ...


Recorder = Callable[[Compute, Inputs], Recording]


class CudaGraphs:
    """Records on a GPU; all recordings share one pool of memory, since no two of them run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute, inputs: Inputs) -> Recording:
        """Record what `compute` launches; it must neither wait for the device nor look at values.

        Raises UnsupportedError where it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of this process (NCCL's, the sentinel's) may ask the device what they like meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = compute(inputs)
        except RuntimeError as error:
            told = f"a layer cannot be recorded ({str(error).splitlines()[0]}): set it to 'never'"
            raise UnsupportedError(told, field="cuda_graphs") from error
        return _CudaGraph(graph, outputs)


@dataclass(frozen=True, eq=False)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    outputs: Outputs

    def replay(self) -> None:
        self.graph.replay()

    def drop(self) -> None:
        self.graph.reset()


@dataclass(frozen=True, eq=False)
class _Kept:
    recording: Recording
    inputs: Inputs


class Graphs:
    """Recordings by key. paused: compute everything anew for now, as when every wait for other ranks is measured.

    A key stands for everything that a function does beside the values of its tensors. Calls come from one stream, one
    after the other. What a call does on other ranks, eager or replayed, is for them alone: it communicates alike.
    """

    paused: bool = False

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._kept: dict[Hashable, _Kept] = {}
        self._calls: dict[Hashable, int] = {}
        self._rooms: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        end_before_groups(self)

    def call(self, key: Hashable, compute: Compute, inputs: Inputs, *, unshared: Collection[str] = ()) -> Outputs:
        """Return what `compute` returns for these inputs, in tensors of the caller's own.

        Inputs of one name, shape and type share one tensor in all recordings; those whose names are `unshared` have one
        in each, since what is derived of them is kept with it.
        """
        kept = self._kept.get(key)
        if kept is None:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= EAGER_CALLS:
                return compute(inputs)
            rooms = {
                name: None if x is None else _room_like(x) if name in unshared else self._shared_room(name, x)
                for name, x in inputs.items()
            }
            _copy(rooms, inputs)  # a recorder may compute
            kept = self._kept[key] = _Kept(self._recorder(compute, rooms), rooms)
        _copy(kept.inputs, inputs)
        kept.recording.replay()
        return tuple(None if x is None else x.clone() for x in kept.recording.outputs)

    def forget(self) -> None:
        """Forget all recordings: memory that they point into is gone, or groups that they communicate in end."""
        while self._kept:
            self._kept.popitem()[1].recording.drop()
        self._calls.clear()

    def _shared_room(self, name: str, x: Tensor) -> Tensor:
        key = name, x.shape, x.dtype
        if key not in self._rooms:
            self._rooms[key] = _room_like(x)
        return self._rooms[key]


def _room_like(x: Tensor) -> Tensor:
    """Return room for x, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _copy(rooms: Inputs, inputs: Inputs) -> None:
    """Copy inputs to where a recording reads them: those of one type in one launch."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for name, room in rooms.items():
        x = inputs[name]
        if room is not None and x is not None:
            into, of = pairs.setdefault(x.dtype, ([], []))
            into.append(room)
            of.append(x)
    for into, of in pairs.values():
        torch._foreach_copy_(into, of)  # pyright: ignore[reportPrivateImportUsage]
