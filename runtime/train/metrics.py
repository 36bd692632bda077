"""What a training step did: floating-point operations, utilisation, one JSON line per step and rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...planner.plan import Plan
from ...traces.errors import InputError
from .model import ModelFacts

BACKWARD_TO_FORWARD = 2.5  # attention: 2 matrix products forward, 5 backward
# Dense bfloat16 peaks of data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Model FLOPs of one optimizer step over all ranks (recomputation not counted)."""

    matrices: float
    attention: float
    attention_dense: float

    @property
    def actual(self) -> float:
        """What was computed."""
        return self.matrices + self.attention

    @property
    def dense_equivalent(self) -> float:
        """What dense attention would have computed for the same tokens."""
        return self.matrices + self.attention_dense


def step_flops(facts: ModelFacts, plan: Plan, *, sequences: int, density: float | None) -> StepFlops | None:
    """Return the FLOPs of `sequences` sequences at this mean density of blocks; None where experts hide their number.

    Active blocks count whole; dense attention counts S * S / 2; columns are bounded by the plan's capacity (each is
    seen by half of the queries on average). density None: dense.
    """
    tokens, shape = plan.seq_len_tokens, plan.model
    if facts.active_parameters is None:
        return None
    matrices = 6.0 * (facts.active_parameters - (0 if facts.tied else facts.embedding_parameters)) * tokens
    per_pair = 4.0 * shape.head_dim * shape.heads * shape.layers * (1 + BACKWARD_TO_FORWARD)
    dense = per_pair * tokens * tokens / 2
    blocks = -(-tokens // plan.block_size)
    pairs = (density or 0.0) * blocks * (blocks + 1) / 2 * plan.block_size**2
    columns = plan.columns_capacity * tokens / 2
    attention = dense if density is None else min(per_pair * (pairs + columns), dense)
    return StepFlops(matrices=matrices * sequences, attention=attention * sequences, attention_dense=dense * sequences)


def peak_flops(device_name: str, stated: float | None) -> float | None:
    """Return one device's peak: the stated one, else the data sheet's; None when unknown."""
    return stated or next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


class MetricsFile:
    """One JSON object per line, flushed line by line: what is written survives the process."""

    def __init__(self, folder: Path, rank: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = (folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", source=folder, field="metrics.folder") from error

    def write(self, **values: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars of rank 0 for TensorBoard. first_step: what an earlier run wrote from that step on no longer counts.

    Raises InputError where the package is missing.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        writer = _summary_writer()
        try:
            self._writer: Any = writer(str(folder), purge_step=first_step or None)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", source=folder, field="metrics.folder") from error

    @staticmethod
    def require() -> None:
        """Raise InputError where the package is missing; write nothing."""
        _summary_writer()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write what is a number, and of lists (one value a layer) every number apart."""
        for name, value in values.items():
            numbered = enumerate(value) if isinstance(value, list) else ()
            for tag, number in ((name, value), *((f"{name}/{place:03d}", entry) for place, entry in numbered)):
                if isinstance(number, int | float) and name != "step":
                    self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("needs the package tensorboard: pip install 'sparsering[tensorboard]'",
                         field="metrics.tensorboard") from error  # fmt: skip
    return SummaryWriter
