"""Attention that a model writes out instead of asking for it: products, a mask, a softmax, and a product again.

Older classes of transformers compute scores themselves. While one of their layers runs, a product of queries with keys
gives `Scores`, which only remember what is done to them: scales, the mask of causal attention, a softmax, and at last
the product with values, which is where attention over ranks is asked for. Whether that is what the class computes, the
audit's numbers say: what is no plain attention (a relative bias, a mask that depends on tokens) differs there.

Shape legend: B batch, H query heads, S_own tokens of a rank's shard, D head dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from ....traces.errors import UnsupportedError
from .asked import no_mask, refuse_masks
from .mask_functions import refuse_own_functions

# q, k, v [B, H, S_own, D], as transformers' attention functions take them, the scale of scores, and slopes [.., H].
Asked = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

PRODUCTS: tuple[Any, ...] = (
    torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__,
)  # fmt: skip
SCALED_PRODUCTS: tuple[Any, ...] = (torch.baddbmm, torch.Tensor.baddbmm)
SOFTMAXES: tuple[Any, ...] = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)
CLAMPS: tuple[Any, ...] = (torch.max, torch.maximum, torch.clamp)


class WrittenOut(TorchFunctionMode):
    """While it is on, products of queries with keys are `Scores`. heads: how many a model has; asked: attention."""

    def __init__(self, heads: int, asked: Asked) -> None:
        super().__init__()
        self.heads, self._asked, self._is_asking = heads, asked, False
        self.times = 0

    def ask(self, *given: Any) -> Tensor:
        """Ask for attention, which multiplies by itself. times: how often."""
        self._is_asking, self.times = True, self.times + 1
        try:
            return self._asked(*given)
        finally:
            self._is_asking = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or remember it where it makes scores."""
        given = dict(kwargs or {})
        if self._is_asking:
            return func(*args, **given)
        if func in SCALED_PRODUCTS:
            added, *factors = (given.get(name, arg) for name, arg in _named(args, "input", "batch1", "batch2"))
            scale, bias = float(given.get("alpha", 1.0)), None if given.get("beta", 1.0) == 0.0 else added
        else:
            scale, bias, factors = 1.0, None, list(args[:2]) if func in PRODUCTS else []
        if len(factors) == 2 and _are_queries_and_keys(*factors):
            q, k = factors[0], factors[1].transpose(-1, -2)
            scores = Scores(q=q, k=k, scale=scale, shape=(*q.shape[:-1], k.shape[-2]), road=self)
            return scores if bias is None or not (_is_of_keys(bias) or bool(bias.any())) else scores + bias
        return func(*args, **given)


def _named(args: Sequence[Any], *names: str) -> list[tuple[str, Any]]:
    """Return arguments with their names; None for those that are not given by place."""
    return [(name, args[number] if number < len(args) else None) for number, name in enumerate(names)]


def _are_queries_and_keys(q: Any, k: Any) -> bool:
    """Whether these are [.., S_own, D] and [.., D, S_own], with heads before them."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor)) or q.dim() < 3 or k.dim() != q.dim():
        return False
    return q.shape[-2] == k.shape[-1] and q.shape[-1] == k.shape[-2] and q.shape[-2] > 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a layer has done to scores [.., S_own, S_own] so far. Does to itself what torch would do to a tensor.

    q, k: as multiplied, [.., S_own, D]; softmaxed: whether they are weights by now. slopes: what is added to the score
    of a key for each token that it is further on (ALiBi), [.., H] or [B * H]; None where nothing is.
    """

    q: Tensor
    k: Tensor
    scale: float
    shape: tuple[int, ...]
    road: WrittenOut
    softmaxed: bool = False
    slopes: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what torch's functions would. UnsupportedError for what attention over ranks cannot."""
        given = dict(kwargs or {})
        own, *others = args
        if not isinstance(own, Scores):
            own, others = (others[0], [own]) if others and isinstance(others[0], Scores) else (given.get("input"), [])
        if isinstance(own, Scores):
            if func in SOFTMAXES:
                return own.softmax(*others, **given)
            if func in PRODUCTS and own is args[0]:
                return own @ others[0]
            if func is torch.nn.functional.dropout:
                return own._undropped(*others, **given)
            if func is torch.Tensor.expand_as and own is not args[0]:
                return args[0].expand(own.shape)
            if func in CLAMPS or func is torch.where:
                return own._masked()
        raise UnsupportedError(
            f"{getattr(func, '__name__', func)} of attention scores is not supported", field="attention"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The queries' type."""
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        """The queries' device."""
        return self.q.device

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return how many dimensions there are."""
        return len(self.shape)

    def view(self, *sizes: Any) -> Self:
        """Return the same with other dimensions before the last two."""
        wanted = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size) else sizes
        reshaped = tuple(torch.empty(self.shape, device="meta").view(*wanted).shape)
        if reshaped[-2:] != tuple(self.shape[-2:]):
            raise UnsupportedError(f"of shape {tuple(self.shape)} as {reshaped}", field="attention scores")
        return replace(self, shape=reshaped)

    reshape = view

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the same: attention has a precision of its own."""
        return self

    float = double = type = type_as = contiguous = to

    def __mul__(self, other: Any) -> Self:
        """Scale; by a matrix, which is taken for a mask, not."""
        return self._masked() if _is_matrix(other) else self._scaled(self._number(other))

    def __truediv__(self, other: Any) -> Self:
        """Scale."""
        return self._scaled(1.0 / self._number(other))

    __imul__, __itruediv__, __rmul__ = __mul__, __truediv__, __mul__

    def __add__(self, other: Any) -> Self:
        """Take what is added for the mask of causal attention, or where it is of keys alone, for ALiBi."""
        if other is None or _is_matrix(other):
            return self._masked()
        if _is_of_keys(other) and self.slopes is None and not self.softmaxed:
            return replace(self, slopes=_slopes(other[..., 0, :]))
        raise UnsupportedError("something is added to scores that is no mask", field="attention")

    __radd__ = __iadd__ = __add__

    def masked_fill(self, mask: Any, value: Any) -> Self:
        """Take it for the mask of causal attention."""
        return self._masked()

    masked_fill_ = masked_fill

    def softmax(self, dim: int | None = None, **settings: Any) -> Self:
        """Return the weights."""
        if dim not in (-1, self.dim() - 1) or self.softmaxed:
            raise UnsupportedError(f"over dimension {dim}", field="softmax of attention scores")
        return replace(self, softmaxed=True)

    def __matmul__(self, v: Any) -> Tensor:
        """Ask for attention: [.., S_own, D] of values [.., S_own, D]."""
        if not (self.softmaxed and isinstance(v, Tensor) and v.dim() == self.dim()):
            raise UnsupportedError("are multiplied before they are weights of values", field="attention scores")
        heads = self.road.heads
        own = (self.q.to(v.dtype), self.k.to(v.dtype), v)  # some classes multiply in float32 what came in 16 bits
        q, k, values = (x.reshape(-1, heads, *x.shape[-2:]) if x.dim() == 3 else x for x in own)
        out = self.road.ask(q, k, values, self.scale, self.slopes).transpose(1, 2)
        return out.reshape(*self.shape[:-1], v.shape[-1])

    matmul = bmm = __matmul__

    def _undropped(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> Self:
        if p and training:
            raise UnsupportedError(f"is {p}; attention dropout is not supported", field="dropout")
        return self

    def _scaled(self, factor: float) -> Self:
        slopes = None if self.slopes is None else self.slopes * factor
        return replace(self, scale=self.scale * factor, slopes=slopes)

    def _masked(self) -> Self:
        if self.softmaxed:
            raise UnsupportedError("are masked after the softmax", field="attention weights")
        return self

    def _number(self, value: Any) -> float:
        if self.softmaxed or not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise UnsupportedError("are scaled by something that is no number", field="attention scores")
        return float(value)


def _slopes(row: Tensor) -> Tensor:
    """Return by how much [.., keys] rises from key to key. UnsupportedError where it is not by the same throughout."""
    slopes = row[..., 1] - row[..., 0]
    keys = torch.arange(row.shape[-1], device=row.device, dtype=torch.float64)
    straight = row[..., :1].double() + slopes[..., None].double() * keys
    # Of the slope, of a product, and of their sum; classes make biases in float32 whatever their parameters are.
    rounding = 4 * max(torch.finfo(row.dtype).eps, torch.finfo(torch.float32).eps)
    if not bool(((row.double() - straight).abs() <= rounding * straight.abs()).all()):
        raise UnsupportedError("that is added to scores of keys does not rise evenly", field="attention bias")
    return slopes


def _is_matrix(value: Any) -> bool:
    """Whether this has an entry for every query and key, or is spread over them."""
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == value.shape[-2]


def _is_of_keys(value: Any) -> bool:
    """Whether this has one row of an entry a key, for all queries."""
    return isinstance(value, Tensor) and value.dim() >= 3 and value.shape[-2] == 1 and value.shape[-1] > 1


class WrittenOutLayers:
    """Has decoder layers ask for the attention that they write out. A deep copy of the model shares it.

    layers: in order. heads: how many a model has. asked: called with the layer, its number, and what `Asked` says.
    A layer's parts are watched too: where a checkpointed layer runs again for its backward, only they are called.
    """

    def __init__(self, layers: Iterable[Module], heads: int, asked: Callable[..., Tensor]) -> None:
        self._heads, self._asked = heads, asked
        self._open: list[WrittenOut | None] = []
        self.hooks: list[Any] = []
        for number, layer in enumerate(layers):
            for module in (layer, *layer.children()):
                self.hooks.append(module.register_forward_pre_hook(partial(self._enter, number)))
                self.hooks.append(module.register_forward_hook(partial(self._leave, module is layer), always_call=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies are called one after the other."""
        return self

    def close(self) -> None:
        """End what an earlier call left open: torch calls no hook where a layer is interrupted (Ctrl-C)."""
        while self._open:
            mode = self._open.pop()
            if mode is not None:
                mode.__exit__(None, None, None)

    def _enter(self, number: int, module: Module, args: Any) -> None:
        mode = None if self._open else WrittenOut(self._heads, partial(self._asked, module, number))
        if mode is not None:
            mode.__enter__()
        self._open.append(mode)

    def _leave(self, is_layer: bool, module: Module, args: Any, output: Any) -> None:
        mode = self._open.pop() if self._open else None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if is_layer and output is not None and not mode.times:  # None: it has failed, and says why
            told = f"is not recognised in {type(module).__name__}: it would be of this rank's shard alone"
            raise UnsupportedError(told, field="attention")


class BodyCalls:
    """Whether the body of an attached model that writes attention out is being called, by thread."""

    def __init__(self) -> None:
        self._running = threading.local()

    @property
    def is_running(self) -> bool:
        """Whether one is, on this thread."""
        return getattr(self._running, "calls", 0) > 0

    def begin(self) -> None:
        """A body is called; calls do not nest."""
        self._running.calls = 1

    def end(self) -> None:
        """It returned, or raised."""
        self._running.calls = 0


BODY_CALLS = BodyCalls()


def zero_masks(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, *,
    attention_mask: Tensor | None = None, dtype: torch.dtype = torch.float32, device: Any = None, **settings: Any,
) -> Tensor:  # fmt: skip
    """Mask function for `AttentionMaskInterface`: zeros, since classes look at a mask's shape.

    UnsupportedError for padding and caches, and for a model that is not attached: masks are asked for by the name in a
    configuration, which models may share.
    """
    if not BODY_CALLS.is_running:
        told = "is that of an attached model too: give this one, which is not attached, a copy of its own"
        raise UnsupportedError(told, field="config")
    refuse_masks(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask)
    refuse_own_functions(settings.get("mask_function"), settings.get("config"))
    return no_mask(batch_size, q_length, kv_length, dtype=dtype, device=device)
