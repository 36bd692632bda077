"""Trained arms in files: what has been trained is judged later, or again, and is never lost by what fails after it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ....runtime.train.config import TrainConfig
from ....traces.errors import InputError
from ....traces.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class KeptArm:
    """One arm's `<arm>.safetensors` and `<arm>.json` in a folder: trained weights, and the row of the training.

    The row is written last and holds digests of the configuration, ranks aside, and of the weights' bytes.
    """

    folder: Path
    arm: str

    def write(self, config: TrainConfig, row: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Keep what was trained. Tensors that share memory, as tied weights do, are written once each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, self._weights)
        digests = {"config_digest": _config_digest(config), "weights_digest": _file_digest(self._weights)}
        write_json(self._row, digests | {"row": row})

    def read(self, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return row and weights; None where the arm is not there. InputError where another training left them."""
        if not self._row.exists():
            return None
        told = read_json(self._row)
        if told["config_digest"] != _config_digest(config):
            raise InputError("was trained by another configuration", source=self._row, field="config_digest")
        if told["weights_digest"] != _file_digest(self._weights):
            raise InputError("is not what was trained", source=self._weights, field="weights_digest")
        return told["row"], load_file(self._weights)

    @property
    def _row(self) -> Path:
        return self.folder / f"{self.arm}.json"

    @property
    def _weights(self) -> Path:
        return self.folder / f"{self.arm}.safetensors"


def _config_digest(config: TrainConfig) -> str:
    told = config.model_dump(mode="json", exclude={"parallel"})
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
