"""Heads in groups, and in a plan's order: what attention gets is permuted on its way in, its results on their way out.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...planner.schedule.heads import HeadOrder, key_order
from ...planner.schedule.schedule import Transfer
from ...traces.errors import UnsupportedError
from ..pattern.form import AttentionForm

Heads = tuple[int, int]  # [first, last)
# Chooses a layer's mask from this rank's (q, k) and the scale that attention is called with.
Chooser = Callable[[Tensor, Tensor, float], AttentionMask]
Pattern = AttentionMask | Chooser


@dataclass(frozen=True, kw_only=True)
class HeadGroups:
    """How heads are split: query heads into `count` equal groups, K/V heads into as many, or shared by neighbours."""

    count: int
    heads: int
    kv_heads: int

    def queries(self, group: int) -> Heads:
        """Return the query heads of a group."""
        size = self.heads // self.count
        return group * size, (group + 1) * size

    def keys(self, group: int) -> Heads:
        """Return the K/V heads that a group uses."""
        return self._used(self.queries(group))

    def keys_within(self, group: int, heads: Heads) -> Heads | None:
        """Return which of a group's K/V heads some of its query heads use, counted from its first; None for all."""
        if heads[1] - heads[0] == self.heads // self.count:
            return None
        (first, last), (used_first, used_last) = self.keys(group), self._used(heads)
        within = used_first - first, used_last - first
        return None if within == (0, last - first) else within

    def key_part(self, group: int) -> int:
        """Return the number of a group's K/V heads among parts of as many; groups may share them."""
        return self.keys(group)[0] // self.kv_heads_of_one

    @property
    def kv_heads_of_one(self) -> int:
        """Number of K/V heads that a group uses."""
        first, last = self.keys(0)
        return last - first

    def require_whole(self, heads: Heads) -> None:
        """Raise UnsupportedError unless query heads belong to one K/V head, or are all of those of several."""
        per_key, (first, last) = self.heads // self.kv_heads, self._used(heads)
        if last - first > 1 and (first * per_key, last * per_key) != heads:
            raise UnsupportedError(f"{heads[0]}:{heads[1]} have parts of several K/V heads' query heads", field="heads")

    def _used(self, heads: Heads) -> Heads:
        per_key = self.heads // self.kv_heads
        return heads[0] // per_key, -(-heads[1] // per_key)


def group_of(transfer: Transfer) -> int:
    """Return the head group of what a transfer moves; 0 where there is one group, or for the columns of all heads."""
    return 0 if transfer.shard is None else transfer.shard.head_group


def head_dimension(x: Tensor) -> int:
    """Return where a tensor has its heads: rows [B, H, S], else [B, S, H, D] or columns [2, B, H, C, D]."""
    return 1 if x.dim() == 3 else 2


def some_heads(x: Tensor, heads: Heads) -> Tensor:
    """Return heads of a tensor, contiguous; see `head_dimension`."""
    return x.narrow(head_dimension(x), heads[0], heads[1] - heads[0]).contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadPermutation:
    """One layer's order of heads. queries int64 [H], keys int64 [H_kv]: the head at each place; inverse: of queries."""

    queries: Tensor
    keys: Tensor
    inverse: Tensor
    _known: dict[int, tuple[weakref.ref[AttentionMask], AttentionMask]] = field(default_factory=dict)

    @classmethod
    def of(cls, order: HeadOrder, *, kv_heads: int, device: torch.device) -> HeadPermutation:
        """Put an order of query heads, and the one of K/V heads that goes with it, on a device."""
        queries = torch.tensor(order, device=device)
        keys = torch.tensor(key_order(order, kv_heads=kv_heads), device=device)
        return cls(queries=queries, keys=keys, inverse=torch.argsort(queries))

    def of_mask(self, mask: Pattern, q: Tensor, k: Tensor) -> Pattern:
        """Return the mask, or the function that chooses it from q and k as the model has them, in this order.

        The same mask is permuted once, and what returns is the same object while it lives.
        """
        if not isinstance(mask, AttentionMask):
            return lambda _q, _k, scale: mask(q, k, scale).of_heads(self.queries)
        known = self._known.get(id(mask))
        if known is not None and known[0]() is mask:
            return known[1]
        key, of_masks, permuted = id(mask), self._known, mask.of_heads(self.queries)
        of_masks[key] = weakref.ref(mask, lambda _: of_masks.pop(key, None)), permuted
        return permuted

    def of_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, S, H, D], k and v [B, S, H_kv, D] in this order."""
        return q.index_select(2, self.queries), k.index_select(2, self.keys), v.index_select(2, self.keys)

    def of_form(self, form: AttentionForm) -> AttentionForm:
        """Return the form with its sinks in this order."""
        return form if form.sinks is None else replace(form, sinks=form.sinks.index_select(0, self.queries))

    def back(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return out [B, S, H, D] and lse [B, H, S] as the model has its heads."""
        return out.index_select(2, self.inverse), lse.index_select(1, self.inverse)
