"""Weights & Biases: https://docs.wandb.ai."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ....traces.errors import InputError
from .writer import scalars


class WeightsAndBiases:
    """One run of Weights & Biases, its files below `folder/wandb`. A resumed training run begins another one.

    told: the training configuration, which the run shows. Raises InputError where the service refuses to begin,
    for example without an API key.
    """

    def __init__(self, folder: Path, *, project: str, name: str | None, mode: str, told: Mapping[str, Any]) -> None:
        wandb = import_module("wandb")
        try:
            self._run = wandb.init(project=project, name=name, mode=mode, dir=str(folder), config=dict(told))
        except wandb.Error as error:
            raise InputError(str(error), field="metrics.wandb") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log every number of a step."""
        self._run.log(dict(scalars(values)), step=step)

    def close(self) -> None:
        """End the run; what is online is uploaded first."""
        self._run.finish()
