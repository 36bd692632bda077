"""Two ranks in one process: two copies of a small model, each on its shard, that meet in attention and nowhere else.

Each copy runs in a thread of its own and stops at every attention call until the other's keys and values are there.
autograd sees one graph, so that one backward gives the gradients that real ranks would add up. What a model mixes
between tokens outside attention stays within a shard, and shows as a difference from the model alone.

Shape legend: B batch, S_own tokens of a shard, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...traces.errors import UnsupportedError
from ..pattern.form import PLAIN, AttentionForm

WAIT_S = 120.0


AttentionCall = tuple[int | None, dict[str, Any]]  # the layer; its heads, kv_heads, head_dim and softcap


class NotingAttention:
    """`model.attached.Attention` that stands in for attention over ranks. calls: what was asked, in order."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def note(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int | None, form: AttentionForm = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """Note a call and return keys and values [B, S, H, D] of every query head."""
        heads, kv_heads = q.shape[2], k.shape[2]
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": q.shape[3], "softcap": form.softcap}
        self.calls.append((layer, shape))
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
        return keys, values

    def close(self) -> None:
        """Nothing is held."""


class ShardsPart(RuntimeError):
    """A copy waits for another that has ended."""


class Meeting:
    """Where the copies' attention calls meet: dense causal attention of each shard's queries on all keys.

    positions: int64 [S_own] of each copy's tokens; valid_tokens: later ones are padding, which gets and gives nothing.
    """

    def __init__(self, positions: list[Tensor], valid_tokens: int) -> None:
        self.positions, self.valid_tokens = positions, valid_tokens
        self._changed = threading.Condition()
        self._given: list[list[Any]] = [[] for _ in positions]  # by copy, in the order of its calls
        self._left: set[int] = set()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return what every copy gave at this call. ShardsPart when one has ended, or stays away for WAIT_S."""
        with self._changed:
            number = len(self._given[rank])
            self._given[rank].append(value)
            self._changed.notify_all()

            def missing() -> set[int]:
                return {other for other, given in enumerate(self._given) if len(given) <= number}

            self._changed.wait_for(lambda: not missing() or bool(missing() & self._left), WAIT_S)
            if missing():
                raise ShardsPart
            return [given[number] for given in self._given]

    def leave(self, rank: int) -> None:
        """Say that a copy gives nothing any more."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()


class MetAttention(NotingAttention):
    """Attention of one copy, over a `Meeting`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self.meeting, self.rank = meeting, rank

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return softmax(scale q k^T) v [B, S_own, H, D] over keys that are not later; 0 for queries of padding.

        form: with its softcap and sinks, over the keys in its reach. UnsupportedError where shards part ways.
        """
        everyone = self.meeting.exchange(self.rank, (layer, *self.note(q, k, v, layer, form)))
        if len({given[0] for given in everyone}) > 1:
            raise UnsupportedError("shards call attention for different layers", field="attention")
        keys, values = (torch.cat([given[part] for given in everyone], dim=1) for part in (1, 2))
        own, everywhere = self.meeting.positions[self.rank], torch.cat(self.meeting.positions)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * float(q.shape[-1] ** -0.5 if scale is None else scale)
        if form.softcap is not None:
            scores = torch.tanh(scores / form.softcap) * form.softcap
        allowed = (everywhere <= own[:, None]) & (everywhere < self.meeting.valid_tokens)
        allowed = allowed & (form.reach.allowed(own, everywhere) | (own >= self.meeting.valid_tokens)[:, None])
        scores = scores.masked_fill(~allowed, -torch.inf)
        if form.sinks is not None:  # a score of a key whose value is zero
            scores = torch.cat([scores, form.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : everywhere.shape[0]]
        out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        return (out * (own < self.meeting.valid_tokens).to(out.dtype)[:, None, None]).contiguous()

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum over all copies of what routers counted. UnsupportedError where shards part ways."""
        everyone = self.meeting.exchange(self.rank, counts)
        if not all(isinstance(given, Tensor) for given in everyone):
            raise UnsupportedError("shards call attention more or less often than each other", field="attention")
        return torch.stack(everyone).sum(0)


def run_together(works: list[Callable[[], Any]], meeting: Meeting) -> list[Any]:
    """Run one function a copy, each in its thread, in double; return their results, or raise what explains the rest."""
    with_gradients = torch.is_grad_enabled()  # a thread of its own would begin with them

    def run(rank: int) -> Any:
        try:
            with torch.set_grad_enabled(with_gradients), Double():
                return works[rank]()
        finally:
            meeting.leave(rank)

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(run, rank) for rank in range(len(works))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, ShardsPart):  # a copy that only waited in vain says the least
            raise error
    if errors:
        raise UnsupportedError("one shard calls attention more often than the other", field="attention")
    return [future.result() for future in futures]


class Double(TorchFunctionMode):
    """Computes in float64 where a model's code asks for float32 (norms, softmax, rotation angles, routers).

    Without it two equal computations differ by a float32 rounding wherever matrix products sum in another order.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with float64 in the place of float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        if func is torch.full and kwargs.get("dtype") is None and isinstance(args[-1], float):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
