"""A study: one training configuration, arms that differ from it in a few settings, and how all of them are judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ....runtime.evaluate.settings import Documents, EvaluationSettings
from ....runtime.train.config import TrainConfig, parse_config
from ....traces.errors import InputError, unknown_name
from ....traces.validation import validated
from ....traces.yaml_files import read_yaml

MAX_FILE_BYTES = 1 << 16


class Judged(BaseModel):
    """How every arm is evaluated when it is trained: see `runtime.evaluate.settings`.

    planted_tasks are asked in a second evaluation, of needles sequences; None: not at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sequences: int = Field(ge=1)
    cut_context_tokens: int = 8192
    planted_tasks: tuple[str, ...] = ("needle",)
    lengths: tuple[int, ...]
    needles: tuple[int, ...] = (1, 10)
    depths: int = 5
    keys: int = 50
    seed: int = 0


class Study(BaseModel):
    """A study file.

    about, margins: what is asked, and what counts as an answer, in words and figures that no code reads: they are
    written down before the runs. train: the configuration of every arm, as `sparsering train` takes it, without model
    and data, which the command line names. arms: by name, what each sets otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: str
    margins: dict[str, float]
    rope_parameters: dict[str, Any] | None = None
    train: dict[str, Any]
    judged: Judged
    arms: dict[str, dict[str, Any]] = Field(min_length=1)

    def config(self, arm: str, *, model: Path, data: Path, context: int, steps: int | None = None) -> TrainConfig:
        """Return one arm's training configuration. InputError in one line; steps: fewer, to time them."""
        if arm not in self.arms:
            raise unknown_name(arm, self.arms, field="arms")
        given = _merged(self.train, self.arms[arm])
        if given.keys() & {"model", "parallel"} or "folder" in given.get("data", {}):
            raise InputError("names model, data folder or ranks, which the command line does", field=f"arms.{arm}")
        named = {
            "model": {"path": model, "rope_parameters": self.rope_parameters},
            "data": {"folder": data},
            "parallel": {"data": 1, "context": context},
        }
        given = _merged(given, named)
        given |= {} if steps is None else {"steps": steps}
        return parse_config(given, source=f"arm {arm}")

    def rehearsed(self) -> Study:
        """Return the study with as little to judge by as there can be."""
        least = {"sequences": 1, "depths": 1, "keys": 1, "needles": (min(self.judged.needles),)}
        return self.model_copy(update={"judged": self.judged.model_copy(update=least)})

    def evaluations(self, config: TrainConfig, *, sparse: bool) -> list[EvaluationSettings]:
        """Return what a trained arm is evaluated by. sparse: it chooses patterns."""
        judged, tokens = self.judged, config.seq_len_tokens
        shared = {
            "seq_len_tokens": tokens, "block_size": config.plan.block_size, "seed": judged.seed,
            "documents": Documents(**config.data.documents.model_dump()),
        }  # fmt: skip
        tasks = ("loss", "agreement", "reach") if sparse else ("loss",)
        found = [EvaluationSettings(
            tasks=tasks, sequences=judged.sequences, cut_context_tokens=judged.cut_context_tokens, **shared
        )]  # fmt: skip
        if judged.planted_tasks:
            found.append(EvaluationSettings(
                tasks=judged.planted_tasks, dense_too=sparse, lengths=judged.lengths, needles=judged.needles,
                depths=judged.depths, keys=judged.keys, **shared
            ))  # fmt: skip
        return found


def read_study(path: Path) -> Study:
    """Read a study's file. InputError, in one line, names file, field and value."""
    return validated(Study, read_yaml(path, max_bytes=MAX_FILE_BYTES), path)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, section by section, the second one's values where both have one; a pattern is taken whole."""
    found = dict(first)
    for key, value in second.items():
        inner = found.get(key)
        if key != "pattern" and isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = _merged(inner, value)
        found[key] = value
    return found
