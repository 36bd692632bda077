"""What a training step did, and where that is written: JSON lines, TensorBoard's files, a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from ...planner.plan import Plan
from ...traces.dataset.manifest import TraceHeader
from ...traces.dataset.writer import TraceWriter
from ...traces.errors import InputError
from ..comm.mesh import Mesh
from .config import TrainConfig
from .model import ModelFacts
from .patterns import LayerLoad, LayerMasks, Observed

BACKWARD_TO_FORWARD = 2.5  # attention: 2 matrix products forward, 5 backward
# Dense bfloat16 peaks of data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did. loss: mean over all valid tokens of all ranks; None without any valid token.

    parts_ms: of attention forward, its backward, and choosing; extra: `measured_values` of a step that was measured.
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


def measured_values(
    config: TrainConfig, facts: ModelFacts, plan: Plan, world: Mesh, *, seconds: float,
    loads: Sequence[LayerLoad] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return a step's utilisation, density, balance, kept mass and peak memory, as JSON values.

    loads: of the layers that were watched, in order; None: attention is dense by construction.
    """
    layers = loads or ()
    densities = [_mean(load.density) for load in layers]
    density = _mean(densities) if layers else None
    masses = [_mean(load.kept_mass) for load in layers if load.kept_mass]
    on_gpu = world.device.type == "cuda"
    stated = config.metrics.peak_flops_per_device if config.metrics else None
    device_name = torch.cuda.get_device_name(world.device) if on_gpu else "cpu"
    peak = stated or next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
    flops = sequence_flops(facts, plan, density=density)
    shares = [None, None]
    if peak is not None and flops is not None:
        shares = [config.sequences_per_step * one / (seconds * peak * world.world_size) for one in flops]
    return {
        "mfu_actual": shares[0],
        "mfu_dense_equivalent": shares[1],
        "density": 1.0 if density is None else density,
        "density_per_layer": densities,
        "density_per_head": [load.density for load in layers],
        "imbalance_per_layer": [load.imbalance for load in layers],
        "kept_mass": 1.0 if loads is None else _mean(masses) if masses else None,
        "kept_mass_per_layer": masses,
        "memory_bytes": torch.cuda.max_memory_allocated(world.device) if on_gpu else None,
    }


def sequence_flops(facts: ModelFacts, plan: Plan, *, density: float | None) -> tuple[float, float] | None:
    """Return model FLOPs of one sequence: those computed, those of dense attention; None where experts hide theirs.

    Recomputation is not counted. density: mean of blocks, None: dense. Active blocks count whole; dense attention
    counts S * S / 2; columns are bounded by the plan's capacity (each is seen by half of the queries on average).
    """
    tokens, shape = plan.seq_len_tokens, plan.model
    if facts.matrix_parameters is None:
        return None
    matrices = 6.0 * facts.matrix_parameters * tokens
    per_pair = 4.0 * shape.head_dim * shape.heads * shape.layers * (1 + BACKWARD_TO_FORWARD)
    dense = per_pair * tokens * tokens / 2
    blocks = -(-tokens // plan.block_size)
    pairs = (density or 0.0) * blocks * (blocks + 1) / 2 * plan.block_size**2
    columns = plan.columns_capacity * tokens / 2
    attention = dense if density is None else min(per_pair * (pairs + columns), dense)
    return matrices + attention, matrices + dense


def observed_of(config: TrainConfig, step: int) -> Observed:
    """Return what is written of a step, and therefore observed."""
    metrics, trace_out = config.metrics, config.trace_out
    recorded = trace_out is not None and step % trace_out.every_steps == 0
    if metrics is None or step % metrics.every_steps:
        return Observed(weighed=recorded, recorded=recorded)
    weighed = metrics.kept_mass_every_steps is not None and step % metrics.kept_mass_every_steps == 0
    return Observed(measured=True, weighed=weighed or recorded, recorded=recorded)


class Outputs:
    """One rank's: metrics of every rank; of rank 0 also TensorBoard's files and, with a header, the trace.

    Metrics are one JSON object per line, flushed line by line: what is written survives the process. first_step: where
    the run begins or goes on; what TensorBoard has of an earlier run from there on no longer counts. Raises InputError
    where a folder cannot be written.
    """

    def __init__(self, config: TrainConfig, *, rank: int, first_step: int, header: TraceHeader | None) -> None:
        self._config, self._rank = config, rank
        section, trace_out = config.metrics, config.trace_out
        self._lines: IO[str] | None = None
        self._board: Any = None
        if section is not None:
            try:
                section.folder.mkdir(parents=True, exist_ok=True)
                self._lines = (section.folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8")
                if section.tensorboard and rank == 0:
                    from torch.utils.tensorboard import SummaryWriter

                    self._board = SummaryWriter(str(section.folder), purge_step=first_step or None)
            except OSError as error:
                told = f"cannot be written: {error.strerror}"
                raise InputError(told, source=section.folder, field="metrics.folder") from error
        self._trace = TraceWriter(trace_out.folder, header) if trace_out and header else None

    def write(self, result: StepResult, masks: LayerMasks | None) -> None:
        """Write what was observed of a step; takes the recorded patterns from `masks`."""
        observed, values = observed_of(self._config, result.step), result.values()
        if self._lines is not None and observed.measured:
            self._lines.write(json.dumps({"rank": self._rank} | values, allow_nan=False) + "\n")
            self._lines.flush()
        if self._board is not None and observed.measured:
            self._write_scalars(result.step, values)
        if observed.recorded and masks is not None:
            records = masks.take_records()
            if self._trace is not None and (not self._trace.steps or result.step > self._trace.steps[-1]):
                self._trace.append(result.step, records)  # a resumed run passes recorded steps again: they are equal

    def _write_scalars(self, step: int, values: dict[str, Any]) -> None:
        """Write what is a number, and of lists (one value a layer) every number apart."""
        for name, value in values.items():
            numbered = enumerate(value) if isinstance(value, list) else ()
            for tag, number in ((name, value), *((f"{name}/{place:03d}", entry) for place, entry in numbered)):
                if isinstance(number, int | float) and name != "step":
                    self._board.add_scalar(tag, number, step)

    def close(self) -> None:
        """Close all files."""
        for output in (self._lines, self._board, self._trace):
            if output is not None:
                output.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
