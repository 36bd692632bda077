"""The sizes that a schedule follows from."""

from __future__ import annotations

from dataclasses import dataclass

from ...traces.errors import InputError
from .schedule import Direction


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What the sizes of transfers follow from: one layer's attention on every rank.

    element_bytes is that of q, k, v; accumulator_bytes that of dk and dv on their way home (4, or 8 for float64).
    """

    world_size: int
    tokens_per_rank: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2
    accumulator_bytes: int = 4
    columns_capacity: int = 0

    def __post_init__(self) -> None:
        for name in ("world_size", "tokens_per_rank", "heads", "kv_heads", "head_dim", "element_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"must be at least 1, not {getattr(self, name)}", field=name)
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads are not a multiple of {self.kv_heads} KV heads", field="kv_heads")

    @property
    def kv_bytes(self) -> int:
        """K and V of one shard."""
        return 2 * self.tokens_per_rank * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def dkv_bytes(self) -> int:
        """dK and dV of one shard in the accumulator's type."""
        return 2 * self.tokens_per_rank * self.kv_heads * self.head_dim * self.accumulator_bytes

    def columns_bytes(self, direction: Direction) -> int:
        """K and V (forward) or dK and dV (backward) of all heads' columns."""
        element_bytes = self.element_bytes if direction == "forward" else self.accumulator_bytes
        return 2 * self.columns_capacity * self.heads * self.head_dim * element_bytes
