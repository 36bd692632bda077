"""Activation checkpointing in which attention runs forward once and patterns are never chosen twice.

A decoder layer is checkpointed whole (torch's non-reentrant checkpoint: backward recomputes it), but what its
attention returned is kept: when the layer is recomputed, attention takes its results from there. Norms, projections
and the MLP are cheap to recompute; attention over a long sequence is not, and it would communicate again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OFFLOADED_FROM_BYTES = 1 << 20  # smaller tensors stay where they are


class Kept:
    """What the attention calls of one run of one checkpointed layer returned, in order; taken once, by recomputation.

    offload: tensors wait in host memory (pinned, where there is a GPU) rather than on the device.
    """

    def __init__(self, *, offload: bool = False) -> None:
        self.replaying = False
        self._offload = offload
        self._results: list[tuple[Any, ...]] = []

    def put(self, *values: Any) -> None:
        """Keep one call's results. Tensors are kept without their history: the caller's graph must not be held."""
        self._results.append(tuple(self._stored(value) for value in values))

    def take(self, device: torch.device) -> tuple[Any, ...]:
        """Return and forget the results of the next call, tensors on `device`."""
        assert self._results, "recomputation calls attention more often than the layer did"
        return tuple(
            value.detach().to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for value in self._results.pop(0)
        )

    @contextmanager
    def during(self, *, replaying: bool) -> Iterator[None]:
        """Keep here what attention returns within, or take it from here."""
        self.replaying = replaying
        token = _KEPT.set(self)
        try:
            yield
        finally:
            _KEPT.reset(token)

    def _stored(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return on_host(value) if self._offload and value.nbytes >= OFFLOADED_FROM_BYTES else value.detach()


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, pinned where it comes from a GPU, without history. Does not wait for the device."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach(), non_blocking=True)


_KEPT: ContextVar[Kept | None] = ContextVar("sparsering_kept", default=None)


def computed_once(compute: Callable[[], tuple[Any, ...]], device: torch.device) -> tuple[Any, ...]:
    """Return what `compute` returns; where a checkpointed layer is recomputed, what was kept of it, on `device`."""
    kept = _KEPT.get()
    if kept is not None and kept.replaying:
        return kept.take(device)
    results = compute()
    if kept is not None:
        kept.put(*results)
    return results


def checkpoint_layer(layer: torch.nn.Module, *, offload: bool = False) -> None:
    """Make a module's forward keep its inputs and its attention's results only; backward recomputes the rest.

    offload: what is kept waits in host memory. Wrap before FSDP, whose hooks then stay outside the recomputation. The
    layer must not draw random numbers (dropout): their state is not kept.
    """
    plain: Callable[..., Any] = layer.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **keywords)
        kept = Kept(offload=offload)
        with _inputs_offloaded() if offload else nullcontext():
            return checkpoint(
                plain, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords,
                context_fn=lambda: (kept.during(replaying=False), kept.during(replaying=True)),
            )  # fmt: skip

    layer.forward = forward


def _inputs_offloaded() -> AbstractContextManager[Any]:
    """The checkpoint saves its inputs as autograd saves tensors: these hooks see them and nothing else."""

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.nbytes < OFFLOADED_FROM_BYTES or isinstance(tensor, torch.nn.Parameter):
            return tensor.device, tensor
        return tensor.device, on_host(tensor)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        return packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
