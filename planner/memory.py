"""Bytes that one layer's attention needs on a rank under a schedule (batch of one), before anything is run.

Counted is what runtime/attention.py holds when backward ends, which is when it holds most: tensors of the layer, and
the slots, kept through both directions. Not counted: indexes of the mask (about 1 % where shards are long), what
kernels need in passing, and whatever else lives on the GPU.

Shape legend: S tokens of a shard, H query heads, D head dim; e bytes of an element, a bytes of an accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout_draft import AttentionShape
from .schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Bytes on one rank at the peak of a step (forward and backward of one layer) with one schedule's slots.

    home_bytes: the rank's own q, k, v, out, dout, log-sum-exp, delta; dq, dk and dv as they are summed and as they are
    returned, which is twice where the types differ
    columns_bytes: gathered K and V of all columns and their gradients
    buffer_bytes: the schedule's slots for other ranks' data, the layer's own kept ones among them
    kept_bytes: the kept slots of all other layers, which wait for their backward
    """

    home_bytes: int
    columns_bytes: int
    buffer_bytes: int
    kept_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.home_bytes + self.columns_bytes + self.buffer_bytes + self.kept_bytes


def layer_memory(schedule: Schedule, shape: AttentionShape, *, layers: int = 1) -> LayerMemory:
    """Return the bytes of a step on every rank, as far as this direction's slots are the larger ones.

    layers: of the model; each of them keeps its own K/V where the schedule keeps any.

    A step needs the larger total of its two directions, which share an arena for their slots.
    """
    q_bytes = shape.tokens_per_rank * shape.heads * shape.head_dim * shape.element_bytes
    dq_bytes = q_bytes * shape.accumulator_bytes // shape.element_bytes
    row_bytes = shape.tokens_per_rank * shape.heads * shape.accumulator_bytes  # log-sum-exp or delta
    home_bytes = 3 * q_bytes + shape.kv_bytes + 2 * row_bytes + dq_bytes + shape.dkv_bytes
    if shape.accumulator_bytes != shape.element_bytes:
        home_bytes += q_bytes + shape.kv_bytes
    return LayerMemory(
        home_bytes=home_bytes,
        columns_bytes=shape.columns_bytes("forward") + shape.columns_bytes("backward"),
        buffer_bytes=schedule.buffer_bytes,
        kept_bytes=(layers - 1) * schedule.kept_bytes,
    )
