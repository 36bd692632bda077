"""What a plan file predicts, checked before a page is made of it: others may have written it, and it seals itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..traces.validation import validated

MOST_US = 1e18  # more is a mistake
# Beside `candidates`.
NEEDED = ("verdict", "evaluator", "forward_us", "backward_us", "step_time_us", "bound_us", "gap", "notes")


class _Checked(BaseModel):
    """Fields that are read anywhere have these types; others may be added, and are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _Candidate(_Checked):
    placement: str
    granularity_tokens: int = Field(gt=0)
    in_words: str
    baseline: bool
    why_not: str | None
    fits_memory: bool
    evaluator: str
    forward_us: float = Field(ge=0, le=MOST_US)
    backward_us: float = Field(ge=0, le=MOST_US)
    step_time_us: float = Field(ge=0, le=MOST_US)


class _Predictions(_Checked):
    verdict: str | None = None
    evaluator: str | None = None
    unvalidated: bool | None = None
    forward_us: float | None = Field(default=None, ge=0, le=MOST_US)
    backward_us: float | None = Field(default=None, ge=0, le=MOST_US)
    step_time_us: float | None = Field(default=None, gt=0, le=MOST_US)
    bound_us: float | None = Field(default=None, ge=0, le=MOST_US)
    gap: float | None = Field(default=None, ge=-1, le=MOST_US)
    best_baseline: str | None = None
    best_baseline_us: float | None = Field(default=None, gt=0, le=MOST_US)
    candidates: tuple[_Candidate, ...] | None = Field(default=None, strict=False)
    notes: tuple[str, ...] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        missing = [name for name in NEEDED if self.candidates is not None and getattr(self, name) is None]
        if missing:
            raise ValueError(f"{missing[0]} is missing beside candidates")
        if (self.best_baseline is None) != (self.best_baseline_us is None):
            raise ValueError("best_baseline and best_baseline_us: one is there without the other")
        return self


class _Record(_Checked):
    predictions: _Predictions


def check_predictions(predictions: dict[str, Any], source: Path) -> None:
    """Raise InputError, naming the field and its value, where predictions are not what a search writes."""
    validated(_Record, {"predictions": predictions}, source)
