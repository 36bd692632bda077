"""Evaluations, as `sparsering eval` writes them, as far as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

EVALUATION_KIND = "sparsering-evaluation"
MOST_HEADS = 1 << 16  # of all layers: what a map of heads has room for, and more


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Bucket(_Read):
    """Tokens that could see at least `first` and less than `until` tokens before them."""

    first: int = Field(ge=0)
    until: int = Field(gt=0)
    tokens: int = Field(ge=0)
    mean: float
    error: float | None = None


class Reading(_Read):
    """Means of one quantity over tokens; arm: dense or sparse."""

    quantity: str
    arm: str
    tokens: int = Field(ge=0)
    mean: float
    error: float | None = None
    buckets: tuple[Bucket, ...] = ()


class Cell(_Read):
    """Questions of one kind, and how many were answered right."""

    task: str
    arm: str
    planted: int = Field(ge=1)
    length_tokens: int = Field(ge=1)
    question: str
    depth_from: float | None = Field(default=None, ge=0, le=1)
    depth_until: float | None = Field(default=None, ge=0, le=1)
    asked: int = Field(ge=1)
    found: int = Field(ge=0)
    share: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class LayerReach(_Read):
    """What the chosen patterns of a layer hold, of each head."""

    layer: int = Field(ge=0)
    total_density: tuple[float, ...]
    unattended: dict[str, tuple[float, ...] | None]


class Evaluation(_Read):
    """One evaluation; fields that are not read here are passed over."""

    arm: str
    selector: str | None
    seq_len: int = Field(ge=1)
    total_density: float | None = None
    heldout_loss: float | None = None
    heldout_loss_dense: float | None = None
    needle_last: float | None = None
    needle_mid: float | None = None
    readings: tuple[Reading, ...] = ()
    cells: tuple[Cell, ...] = ()
    reach: tuple[LayerReach, ...] = ()

    def reading(self, quantity: str, arm: str) -> Reading | None:
        """Return one reading, None where it was not taken."""
        return next((one for one in self.readings if (one.quantity, one.arm) == (quantity, arm)), None)

    @property
    def sentence(self) -> str:
        """What it found, in a sentence; of what was not measured, nothing."""
        told = [told for told in (self._of_loss(), self._of_context(), self._of_needles()) if told]
        return f"{self.arm}, {self.seq_len:,} tokens: {'; '.join(told) or 'see below'}."

    def _of_loss(self) -> str | None:
        loss, dense = self.heldout_loss, self.heldout_loss_dense
        if loss is None:
            return None
        if self.selector is None:
            return f"held-out loss {loss:.4f} nats a token, with dense attention"
        beside = "" if dense is None else f", {dense:.4f} with dense attention"
        return f"held-out loss {loss:.4f} nats a token with {self.selector}{beside}"

    def _of_context(self) -> str | None:
        """Whether far context helps: the last bucket, beyond two standard errors."""
        gain = self.reading("cut_minus_whole", "dense" if self.selector is None else "sparse")
        if gain is None or not gain.buckets:
            return None
        last = gain.buckets[-1]
        size = f"{last.mean:+.4f} nats from token {last.first:,} on".replace("-", "−")
        if last.error is None:
            return f"the context cut changes the loss by {size}"
        sure = abs(last.mean) > 2 * last.error
        return f"the context cut changes the loss by {size}, {'more' if sure else 'less'} than two standard errors"

    def _of_needles(self) -> str | None:
        if self.needle_last is None or self.needle_mid is None:
            return None
        return f"needles found: {self.needle_last:.0%} asked last, {self.needle_mid:.0%} asked in mid-document"


def short_tokens(tokens: int) -> str:
    """Return a number of tokens as 512, 8K, 128K, 1M where it is a whole number of these."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def heads_of(reach: Sequence[LayerReach]) -> int:
    """Return the most heads of any layer."""
    return max((len(one.total_density) for one in reach), default=0)
