"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .writer import scalars


class TensorBoard:
    """Writes scalars. first_step: what the folder has of an earlier run from there on no longer counts."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write every number of a step."""
        for tag, number in scalars(values):
            self._board.add_scalar(tag, number, step)

    def close(self) -> None:
        """Write what is held back and close the file."""
        self._board.close()
