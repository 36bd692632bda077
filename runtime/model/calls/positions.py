"""Held in every step: the positions that a model is called with are those of this rank's shard.

A wrong shard, or positions left out, would train on angles and masks that do not belong together, and no curve would
show it.

Shape legend: B batch, S_own tokens of this rank's shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....traces.errors import InputError, UnsupportedError


class PositionGuard:
    """Compares the positions of every call with the plan's, on the device.

    On a GPU nothing waits when the call begins: `settle`, after the call's kernels were issued, waits for the
    comparison alone, which ran first.
    """

    def __init__(self, own: Tensor) -> None:
        """own: int64 [S_own], this rank's positions in the order of its shard."""
        self._plan, self._expected = own, own[None]
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def expect(self, position_ids: Tensor | None) -> None:
        """Take other positions [B, S_own] for right until told otherwise: documents that restart. None: the plan's."""
        self._expected = self._plan[None] if position_ids is None else position_ids

    def check(self, position_ids: Tensor | None, uncounted: Tensor | None = None) -> None:
        """Refuse a call without positions or with another shape; begin to compare the values.

        uncounted: bool scalar, whether there are tokens that the model leaves out when it counts.
        Raises UnsupportedError when there are none, InputError for shapes, and on a CPU for values.
        """
        if position_ids is None:
            raise UnsupportedError("is missing: a shard's tokens are not 0, 1, 2, …; pass what shard() returns",
                                   field="position_ids")  # fmt: skip
        if position_ids.dim() != 2 or position_ids.shape[1] != self._plan.numel():
            raise InputError(f"shape {tuple(position_ids.shape)} is not [B, {self._plan.numel()}] of this rank's shard",
                             field="position_ids")  # fmt: skip
        differs = (position_ids != self._expected.to(position_ids.device)).any()
        differs = torch.stack([differs, torch.zeros_like(differs) if uncounted is None else uncounted])
        event = None
        if differs.device.type == "cuda":
            differs = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(differs, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = differs, event
        if event is None:
            self.settle()

    def settle(self) -> None:
        """Raise InputError when the values of the last call were not this rank's."""
        if self._pending is None:
            return
        (differs, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        differs, uncounted = differs.tolist()
        if uncounted:
            raise UnsupportedError("has padding, which this model leaves out when it numbers tokens: a shard does not "
                                   "know how many came before", field="input_ids")  # fmt: skip
        if differs:
            raise InputError("are not those of this rank's shard: call shard() with this rank's number",
                             field="position_ids")  # fmt: skip
