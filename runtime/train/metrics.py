"""What a training step did, and where that is written: JSON lines, TensorBoard's files, a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ...planner.plan import Plan
from ...traces.dataset.manifest import TraceHeader
from ...traces.dataset.writer import TraceWriter
from ...traces.errors import InputError
from .config import TrainConfig
from .facts import ModelFacts
from .patterns import LayerLoad, LayerMasks, Observed

BACKWARD_TO_FORWARD = 2.5  # attention: 2 matrix products forward, 5 backward
# Dense bfloat16 peaks of data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did. loss: mean over all valid tokens of all ranks; None without any valid token.

    parts_ms: of attention forward, its backward, and choosing; extra: what `Meter` says of a step that was measured.
    """

    step: int
    loss: float | None
    grad_norm: float
    learning_rate: float
    valid_tokens: int
    tokens: int
    seconds: float
    parts_ms: dict[str, float]
    extra: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        own = {name: getattr(self, name) for name in ("step", "loss", "grad_norm", "learning_rate", "valid_tokens")}
        speed = {"step_time_us": self.seconds * 1e6, "tokens_per_s": self.tokens / self.seconds}
        parts = {f"{name}_ms": value for name, value in self.parts_ms.items()}
        return own | speed | parts | self.extra


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


@dataclass(frozen=True)
class Meter:
    """What the figures of every measured step are worked out from."""

    config: TrainConfig
    facts: ModelFacts
    plan: Plan
    device: torch.device
    world_size: int

    def values(self, seconds: float, loads: Mapping[int, LayerLoad] | None) -> dict[str, Any]:
        """Return a step's utilisation, density, balance, kept mass and peak memory, as JSON values.

        loads: of the layers that were watched; None: attention is dense by construction.
        """
        layers = [load for _, load in sorted((loads or {}).items())]
        densities = [_mean(load.density) for load in layers]
        density = _mean(densities) if layers else None
        masses = [_mean(load.kept_mass) for load in layers if load.kept_mass]
        kept_mass = _mean(masses) if masses else None
        cuda = self.device.type == "cuda"
        return {
            **self._utilisation(seconds, density),
            "density": 1.0 if density is None else density,
            "density_per_layer": densities,
            "density_per_head": [load.density for load in layers],
            "imbalance_per_layer": [load.imbalance for load in layers],
            "kept_mass": 1.0 if loads is None else kept_mass,
            "kept_mass_per_layer": masses,
            "memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
        }

    def _utilisation(self, seconds: float, density: float | None) -> dict[str, float | None]:
        """Model FLOPs over what all devices could have done; None where either is not known."""
        flops = step_flops(self.facts, self.plan, sequences=self.config.sequences_per_step, density=density)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        peak = peak_flops(name, self.config.metrics.peak_flops_per_device if self.config.metrics else None)
        names = {"mfu_actual": "actual", "mfu_dense_equivalent": "dense_equivalent"}
        if peak is None or flops is None:
            return dict.fromkeys(names)
        return {key: getattr(flops, name) / (seconds * peak * self.world_size) for key, name in names.items()}


def peak_flops(device_name: str, stated: float | None) -> float | None:
    """Return one device's peak: the stated one, else the data sheet's; None when unknown."""
    return stated or next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def observed_of(config: TrainConfig, step: int) -> Observed:
    """Return what is written of a step, and therefore observed."""
    metrics, trace_out = config.metrics, config.trace_out
    weighed_every = metrics.kept_mass_every_steps if metrics is not None else None
    return Observed(
        measured=metrics is not None and step % metrics.every_steps == 0,
        weighed=weighed_every is not None and step % weighed_every == 0,
        recorded=trace_out is not None and step % trace_out.every_steps == 0,
    )


class Outputs:
    """One rank's: metrics of every rank; of rank 0 also TensorBoard's files and, with a header, the trace.

    first_step: where the run begins or goes on. Raises InputError where a folder cannot be written.
    """

    def __init__(self, config: TrainConfig, *, rank: int, first_step: int, header: TraceHeader | None) -> None:
        self._config, self._rank = config, rank
        section, trace_out = config.metrics, config.trace_out
        self._metrics = None if section is None else MetricsFile(section.folder, rank)
        wants_board = section is not None and section.tensorboard and rank == 0
        self._board = TensorBoard(section.folder, first_step=first_step) if section and wants_board else None
        self._trace = TraceWriter(trace_out.folder, header) if trace_out and header else None

    def write(self, result: StepResult, masks: LayerMasks | None) -> None:
        """Write what was observed of a step; takes the recorded patterns from `masks`."""
        observed = observed_of(self._config, result.step)
        if self._metrics is not None and observed.measured:
            self._metrics.write(rank=self._rank, **result.values())
        if self._board is not None and observed.measured:
            self._board.write(result.step, result.values())
        if observed.recorded and masks is not None:
            records = masks.take_records()
            if self._trace is not None and (not self._trace.steps or result.step > self._trace.steps[-1]):
                self._trace.append(result.step, records)  # a resumed run passes recorded steps again: they are equal

    def close(self) -> None:
        """Close all files."""
        for output in (self._metrics, self._board, self._trace):
            if output is not None:
                output.close()


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
