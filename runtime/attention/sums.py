"""Backward's sums of dK and dV on one rank: in slots, for other ranks' keys, and at home, for its own.

Launches add to them, and so does what lands. A sum that holds nothing yet is begun by overwriting.

Shape legend: B batch, S tokens of a shard, H_kv K/V heads of a slot, D head dim, n slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ...kernels.api import Backend, KeyGradients
from ...planner.schedule.schedule import DKV_HOME, Transfer
from .buffers import Pair, Slots, narrowed, runs_of_neighbours
from .heads import HeadGroups, Heads, group_of


@dataclass(eq=False)
class Sum:
    """(dK, dV) [B, S, H_kv, D], and whether they hold anything."""

    pair: Pair
    filled: bool = False

    def fill(self) -> None:
        """Zero what holds nothing yet."""
        if not self.filled:
            for part in self.pair:
                part.zero_()
        self.filled = True

    def add(self, parts: Pair, backend: Backend) -> None:
        """Add parts [n, B, S, H_kv, D], in order."""
        for into, some in zip(self.pair, parts, strict=True):
            backend.add_up(into, some, add=self.filled)
        self.filled = True


@dataclass(eq=False, kw_only=True)
class KeySums:
    """All of them. home: the rank's own (dK, dV), all heads, in the accumulator's dtype; dtype: that of q, k and v."""

    slots: Slots
    groups: HeadGroups
    home: Pair
    backend: Backend
    dtype: torch.dtype
    _slots: dict[str, Sum] = field(default_factory=dict)
    _computed: dict[int, Sum] = field(default_factory=dict)  # of the own keys by head group, where there are several

    def __post_init__(self) -> None:
        heads = {self.groups.keys(group) for group in range(self.groups.count)}
        grad_k, grad_v = self.home
        self._home = {some: Sum((grad_k[:, :, slice(*some)], grad_v[:, :, slice(*some)])) for some in sorted(heads)}

    def for_launch(self, names: Sequence[str], group: int) -> KeyGradients:
        """Return where a launch adds dK and dV for a head group.

        Where it is in some of these buffers, the others are zeroed: the launch adds to all or to none.
        """
        sums = [self._for_launch(name, group) for name in names]
        add = any(one.filled for one in sums)
        for one in sums:
            if add:
                one.fill()
            one.filled = True
        grad_k, grad_v = sums[0].pair if len(sums) == 1 else self.slots.joined(names)
        return KeyGradients(k=grad_k, v=grad_v, add=add)

    def add_some_heads(self, names: Sequence[str], group: int, within: Heads, grads: KeyGradients) -> None:
        """Add what a launch computed for some of a group's K/V heads alone, counted from the group's first."""
        target = self.for_launch(names, group)
        for into, grad in ((target.k, grads.k), (target.v, grads.v)):
            if not target.add:
                into.zero_()
            into[:, :, slice(*within)] += grad

    def landing(self, transfer: Transfer) -> Pair:
        """Return where a transfer of gradients lands."""
        if transfer.accumulate_into is None:
            self._slot(transfer.buffer).filled = True  # from here on: it may be sent on before it is waited for
        pair = self.slots[transfer.buffer]
        return (narrowed(pair[0], self.dtype), narrowed(pair[1], self.dtype)) if transfer.narrow else pair

    def forget(self, names: Iterable[str]) -> None:
        """Learn that what these slots held went on."""
        for name in names:
            self._slot(name).filled = False

    def land(self, transfers: Sequence[Transfer]) -> None:
        """Add what landed to where it belongs; what lies side by side, in one pass."""
        landed: dict[tuple[str, Heads], list[str]] = {}
        for transfer in transfers:
            into = transfer.accumulate_into
            if into is None:
                continue
            target = into, self.groups.keys(group_of(transfer))
            if transfer.narrow and self.slots[transfer.buffer][0].dtype != self.dtype:
                self._add_landed(landed)  # its sum may lie in a slot that one of them landed in
                grad_k, grad_v = self.landing(transfer)
                self._landed(*target).add((grad_k[None], grad_v[None]), self.backend)
            else:
                landed.setdefault(target, []).append(transfer.buffer)
        self._add_landed(landed)

    def at_home(self) -> Pair:
        """Return the own (dK, dV) of all heads, to be added to; where they hold nothing, zeroed."""
        for one in self._home.values():
            one.fill()
        return self.home

    def finish(self) -> Pair:
        """Return the own (dK, dV) of all heads."""
        for group, computed in self._computed.items():
            grad_k, grad_v = computed.pair
            self._home[self.groups.keys(group)].add((grad_k[None], grad_v[None]), self.backend)
        self._computed.clear()
        return self.at_home()

    def _add_landed(self, landed: dict[tuple[str, Heads], list[str]]) -> None:
        for target, names in landed.items():
            for together in runs_of_neighbours(names):
                self._landed(*target).add(self.slots.block(together[0], len(together)), self.backend)
        landed.clear()

    def _landed(self, name: str, heads: Heads) -> Sum:
        return self._home[heads] if name == DKV_HOME else self._slot(name)

    def _for_launch(self, name: str, group: int) -> Sum:
        """Kernels write contiguous heads: a group's own sum is put home in the end."""
        if name != DKV_HOME:
            return self._slot(name)
        home = self._home[self.groups.keys(group)]
        if self.groups.count == 1:
            return home
        if group not in self._computed:
            grad_k, grad_v = home.pair
            self._computed[group] = Sum((grad_k.new_empty(grad_k.shape), grad_v.new_empty(grad_v.shape)))
        return self._computed[group]

    def _slot(self, name: str) -> Sum:
        return self._slots.setdefault(name, Sum(self.slots[name]))
