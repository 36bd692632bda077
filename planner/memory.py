"""Bytes that one layer's attention needs on a rank under a schedule (batch of one), before anything is run.

Shape legend: S tokens of a shard, H query heads, D head dim; e bytes of an element, a bytes of an accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout_draft import AttentionShape
from .schedule import COLUMNS_HOME, DCOLUMNS_HOME, DKV_HOME, KV_HOME, Schedule

HOME_OF_LAYER = (KV_HOME, DKV_HOME)
HOME_OF_COLUMNS = (COLUMNS_HOME, DCOLUMNS_HOME)


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Bytes on one rank at the peak of one direction.

    home_bytes: the rank's own q, k, v, out, log-sum-exp and, in backward, dout, delta, dq, dk and dv
    columns_bytes: gathered K and V of all columns and, in backward, their gradients
    buffer_bytes: the schedule's slots for other ranks' data
    """

    home_bytes: int
    columns_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.home_bytes + self.columns_bytes + self.buffer_bytes


def layer_memory(schedule: Schedule, shape: AttentionShape) -> LayerMemory:
    """Return the bytes that a schedule built from `shape` needs on every rank."""
    capacity = {buffer.name: buffer.capacity_bytes for buffer in schedule.buffers}
    elements = shape.tokens_per_rank * shape.heads * shape.head_dim  # of q, of out, of their gradients
    row_bytes = shape.tokens_per_rank * shape.heads * shape.accumulator_bytes  # log-sum-exp or delta
    home_bytes = elements * (shape.element_bytes + shape.accumulator_bytes) + row_bytes  # q; out and its log-sum-exp
    if schedule.direction == "backward":  # q, out, dout; dq; log-sum-exp and delta
        home_bytes = elements * (3 * shape.element_bytes + shape.accumulator_bytes) + 2 * row_bytes
    return LayerMemory(
        home_bytes=home_bytes + sum(capacity.get(name, 0) for name in HOME_OF_LAYER),
        columns_bytes=sum(capacity.get(name, 0) for name in HOME_OF_COLUMNS),
        buffer_bytes=schedule.buffer_bytes,
    )
