"""What an evaluation found: one JSON file, read again through the gate of untrusted files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...traces.errors import InputError
from ...traces.files import read_json
from ...traces.validation import validated

SCHEMA_VERSION = 1
KIND = "sparsering-evaluation"
MAX_FILE_BYTES = 64 << 20
MAX_FILE_VALUES = 1 << 22
NORMAL_95 = 1.959963984540054
Share = Field(ge=0, le=1)
Arm = Literal["dense", "sparse"]
Quantity = Literal["loss", "cut_loss", "cut_minus_whole", "loss_minus_dense", "kl", "top_1"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Bucket(_Strict):
    """Tokens that could see at least `first` and less than `until` tokens before them."""

    first: int = Field(ge=0)
    until: int = Field(gt=0)
    tokens: int = Field(ge=0)
    mean: float
    error: float | None


class Reading(_Strict):
    """Means of one quantity over tokens, in all and by bucket; error: standard error over sequences.

    quantity: loss, cut_loss (the context cut), cut_minus_whole, loss_minus_dense, kl (nats, of the dense next-token
    distribution and the sparse one), top_1 (share of tokens whose most likely successor is the same). The two
    differences are of the same tokens, token by token, and so are their errors. arm: dense or sparse attention.
    """

    quantity: Quantity
    arm: Arm
    tokens: int = Field(ge=1)
    mean: float
    error: float | None
    buckets: tuple[Bucket, ...]


class Cell(_Strict):
    """Questions of one kind, and how many were answered right; low, high: Wilson's 95 % interval of the share.

    planted: needles of a sequence, or chains of variables, or 1. depth_from, depth_until: where the needle stood, as a
    share of the text before the first question; None where that is not asked.
    """

    task: Literal["needle", "tracking", "aggregation"]
    arm: Arm
    planted: int = Field(ge=1)
    length_tokens: int = Field(ge=1)
    question: Literal["last", "mid"]
    depth_from: float | None
    depth_until: float | None
    asked: int = Field(ge=1)
    found: int = Field(ge=0)
    share: float = Share
    low: float = Share
    high: float = Share


class LayerReach(_Strict):
    """What the chosen patterns of a layer hold, of each head; means over sequences.

    density: active causal blocks over all; total_density: columns counted too; kept_mass: of attention, by sampled
    queries. unattended: by distance in tokens, as text: the share of keys with later queries that far, which none of
    these attends.
    """

    layer: int = Field(ge=0)
    density: tuple[float, ...]
    total_density: tuple[float, ...]
    kept_mass: tuple[float, ...] | None
    unattended: dict[str, tuple[float, ...] | None]


class Evaluation(_Strict):
    """Everything that `evaluate` found. What was not asked for is None or empty.

    heldout_loss: with the selector where there is one, else dense; heldout_loss_dense: the same weights and tokens
    attended densely. needle_last, needle_mid: share of needles found in the longest sequences with the most needles,
    over all depths, by where the question stands. total_density: mean over chosen layers, heads and sequences.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["sparsering-evaluation"] = KIND
    arm: str
    selector: str | None
    selector_settings: dict[str, Any]
    seq_len: int
    steps: int | None = None
    seed: int
    total_density: float | None
    heldout_loss: float | None
    heldout_loss_dense: float | None
    needle_last: float | None
    needle_mid: float | None
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    attention: dict[str, tuple[str, ...]]
    versions: dict[str, str]
    readings: tuple[Reading, ...] = ()
    cells: tuple[Cell, ...] = ()
    reach: tuple[LayerReach, ...] = ()

    def row(self) -> dict[str, Any]:
        """Return the flat row that a result file of benchmarks has of it."""
        names = ("arm", "selector", "seq_len", "steps", "seed", "total_density", "heldout_loss", "heldout_loss_dense",
                 "needle_last", "needle_mid")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def reading(self, quantity: str, arm: str) -> Reading | None:
        """Return one reading, None where it was not taken."""
        return next((one for one in self.readings if (one.quantity, one.arm) == (quantity, arm)), None)


def read_evaluation(path: Path) -> Evaluation:
    """Read what `sparsering eval` wrote. InputError, in one line, names file, field and value."""
    document = read_json(path, max_bytes=MAX_FILE_BYTES, max_values=MAX_FILE_VALUES)
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise InputError("is no evaluation of sparsering", source=path, field="kind")
    return validated(Evaluation, document, path, newest_schema=SCHEMA_VERSION)


def wilson(found: int, asked: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (E. B. Wilson, 1927): honest near 0 and 1, and for few questions."""
    share, spread = found / asked, NORMAL_95**2 / asked
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
