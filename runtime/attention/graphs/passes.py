"""Forward and backward of a planned layer as recordings, that all layers of one shape share.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ....kernels.index.device_lists import UNCOUNTED_LIMIT
from ....kernels.mask import AttentionMask
from ....planner.schedule.schedule import Direction
from ...pattern.form import AttentionForm
from ..masks import Indexes
from .graphs import Compute, Graphs, Inputs, Outputs
from .mask_tensors import NAMES, fixed_of, tensors_of, with_tensors

Qkv = tuple[Tensor, ...]


class Results(NamedTuple):
    """What forward gives and backward reads: out [B, S, H, D], lse [B, H, S], columns, kept K/V (or None)."""

    out: Tensor
    lse: Tensor
    columns: Tensor | None
    kept_kv: Tensor | None


class Gradients(NamedTuple):
    """dq [B, S, H, D] in q's type, dk, dv [B, S, H_kv, D] and the sinks' [H] (or None) in the accumulator's."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


class Passes(Protocol):
    """Who plays a layer, one launch after the other."""

    def play_forward(self, qkv: Qkv, indexes: Indexes, scale: float, form: AttentionForm) -> Results:
        """Play forward on contiguous q, k, v."""
        ...

    def play_backward(
        self, grad_out: Tensor, qkv: Qkv, results: Results, indexes: Indexes, scale: float, form: AttentionForm
    ) -> Gradients:
        """Play backward."""
        ...


class RecordedPasses:
    """Plays layers by recordings. indexed: makes the indexes of a mask, of this rank's queries.

    generation: which memory the buffers of other ranks' data lie in; recordings of another one are of no use.
    """

    def __init__(
        self, passes: Passes, graphs: Graphs, *, indexed: Callable[[AttentionMask], Indexes],
        generation: Callable[[], int],
    ) -> None:  # fmt: skip
        self._passes, self._graphs, self._indexed, self._generation = passes, graphs, indexed, generation
        self._recorded_in = generation()

    @property
    def ready(self) -> bool:
        """Whether layers are played by recordings at all now."""
        return not self._graphs.paused

    def takes(self, mask: AttentionMask, tokens: int) -> bool:
        """Whether a layer under this mask can be; tokens: of this rank's shard."""
        # Longer lists are counted first, which waits for the device.
        rows = -(-tokens // mask.block_size)
        return mask.is_toeplitz or mask.heads * rows * mask.blocks <= UNCOUNTED_LIMIT

    def forward(self, qkv: Qkv, mask: AttentionMask, scale: float, form: AttentionForm) -> Results:
        """Return forward's results."""

        def play(given: Inputs) -> Outputs:
            q, k, v = _all(given, "q", "k", "v")
            indexes = self._indexed(with_tensors(mask, given))
            return self._passes.play_forward((q, k, v), indexes, scale, _form(form, given))

        out, lse, columns, kept_kv = self._call("forward", play, _qkv(qkv), mask, scale, form)
        assert out is not None and lse is not None
        return Results(out, lse, columns, kept_kv)

    def backward(
        self, grad_out: Tensor, qkv: Qkv, results: Results, mask: AttentionMask, scale: float, form: AttentionForm
    ) -> Gradients:
        """Return backward's gradients."""

        def play(given: Inputs) -> Outputs:
            grad, q, k, v, out, lse = _all(given, "grad_out", "q", "k", "v", "out", "lse")
            kept = Results(out, lse, given["columns"], given["kept_kv"])
            indexes = self._indexed(with_tensors(mask, given))
            return self._passes.play_backward(grad, (q, k, v), kept, indexes, scale, _form(form, given))

        inputs = {"grad_out": grad_out, **_qkv(qkv), **results._asdict()}
        grad_q, grad_k, grad_v, grad_sinks = self._call("backward", play, inputs, mask, scale, form)
        assert grad_q is not None and grad_k is not None and grad_v is not None
        return Gradients(grad_q, grad_k, grad_v, grad_sinks)

    def _call(
        self, direction: Direction, play: Compute, tensors: Inputs, mask: AttentionMask, scale: float,
        form: AttentionForm,
    ) -> Outputs:  # fmt: skip
        if self._generation() != self._recorded_in:
            self._graphs.forget()
            self._recorded_in = self._generation()
        inputs = {**tensors, "sinks": _values(form.sinks)}
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in inputs.values())
        key = direction, shapes, fixed_of(mask), scale, form.softcap
        return self._graphs.call(key, play, inputs | tensors_of(mask), unshared=NAMES)


def _all(given: Inputs, *names: str) -> list[Tensor]:
    tensors = [given[name] for name in names]
    assert all(tensor is not None for tensor in tensors)
    return [tensor for tensor in tensors if tensor is not None]


def _qkv(qkv: Qkv) -> dict[str, Tensor]:
    return dict(zip(("q", "k", "v"), qkv, strict=True))


def _values(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.detach()


def _form(form: AttentionForm, given: Inputs) -> AttentionForm:
    return AttentionForm(softcap=form.softcap, sinks=given["sinks"])
