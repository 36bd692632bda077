"""The writers that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ....traces.errors import InputError
from ..config import MetricsSection, TrainConfig
from .json_lines import JsonLines
from .tensorboard import TensorBoard
from .wandb import WeightsAndBiases
from .writer import MetricWriter


def require_packages(section: MetricsSection) -> None:
    """Refuse, before any work, metrics whose optional package is not installed: InputError says how to install it."""
    if section.tensorboard:
        with _needing("tensorboard"):
            _ = import_module("torch.utils.tensorboard").SummaryWriter
    if section.wandb is not None:
        with _needing("wandb"):
            _ = import_module("wandb").init


@contextmanager
def _needing(package: str) -> Iterator[None]:
    """Name the package that is missing. A mere folder of its name, as wandb itself writes, has no attributes."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        problem = f"needs the package {package}: pip install {package}"
        raise InputError(problem, field=f"metrics.{package}") from error


def open_writers(config: TrainConfig, *, rank: int, first_step: int) -> list[MetricWriter]:
    """Open JSON lines for every rank, and for rank 0 what else `config.metrics` names; none without that section.

    Raises InputError where the folder cannot be written.
    """
    section = config.metrics
    if section is None:
        return []
    try:
        section.folder.mkdir(parents=True, exist_ok=True)
        writers: list[MetricWriter] = [JsonLines(section.folder, rank=rank)]
        if section.tensorboard and rank == 0:
            writers.append(TensorBoard(section.folder, first_step=first_step))
        if section.wandb is not None and rank == 0:
            told = config.model_dump(mode="json")
            writers.append(WeightsAndBiases(section.folder, **section.wandb.model_dump(), told=told))
    except OSError as error:
        told = f"cannot be written: {error.strerror}"
        raise InputError(told, source=section.folder, field="metrics.folder") from error
    return writers
