"""The sizes that a schedule follows from."""

from __future__ import annotations

from dataclasses import dataclass

from ...traces.errors import InputError
from .schedule import Direction, TransferKind


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

    def why_not_groups_of(self, size: int) -> str | None:
        """Return why ranks do not form groups of that size, in one line; None where they do."""
        return f"{self.world_size} ranks are no groups of {size}" if self.world_size % size else None

    def splits_heads(self, degree: int) -> bool:
        """Whether `degree` groups of equally many heads use equally many whole K/V heads each."""
        return not self.heads % degree and not max(degree, self.kv_heads) % min(degree, self.kv_heads)

    def group_bytes(self, direction: Direction, degree: int) -> dict[TransferKind, int]:
        """Return the bytes of what a rank holds of one shard for one of `degree` head groups, by kind of transfer."""
        heads, kv_heads = self.heads // degree, max(1, self.kv_heads // degree)
        q_bytes = self.tokens_per_rank * heads * self.head_dim * self.element_bytes
        row_bytes = self.tokens_per_rank * heads * self.accumulator_bytes  # log-sum-exp or delta
        kv_bytes = self.kv_bytes // self.kv_heads * kv_heads
        if direction == "forward":
            return {"q": q_bytes, "kv": kv_bytes, "out": q_bytes + row_bytes}
        # q travels with dout, its log-sum-exp and delta; dq goes back in the type of q
        dkv_bytes = self.dkv_bytes // self.kv_heads * kv_heads
        return {"q": 2 * (q_bytes + row_bytes), "kv": kv_bytes, "out": q_bytes, "dkv": dkv_bytes}
