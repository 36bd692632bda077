"""What a training step did, and where that is written: the writers of its metrics, and a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...planner.plan import Plan
from ...traces.dataset.manifest import TraceHeader
from ...traces.dataset.writer import TraceWriter
from ..comm.mesh import Mesh
from .config import MetricsSection, TraceOutSection, TrainConfig
from .model import ModelFacts
from .patterns import LayerLoad, LayerMasks, Observed
from .writers.opened import open_writers
from .writers.writer import NotWritten

BACKWARD_TO_FORWARD = 2.5  # attention: 2 matrix products forward, 5 backward
# Dense bfloat16 peaks of data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did. loss: mean over all valid tokens of all ranks; None without any valid token.

    router_loss: of the routers' load balancing, before its coefficient; None where the model adds none.
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
    router_loss: float | None = None

    def values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        own = {name: getattr(self, name) for name in ("step", "loss", "grad_norm", "learning_rate", "valid_tokens")}
        speed = {"step_time_us": self.seconds * 1e6, "tokens_per_s": self.tokens / self.seconds}
        parts = {f"{name}_ms": value for name, value in self.parts_ms.items()}
        routers = {} if self.router_loss is None else {"router_loss": self.router_loss}
        return own | routers | speed | parts | self.extra


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
    exposed = step % metrics.exposure_every_steps == 0
    return Observed(measured=True, exposed=exposed, weighed=weighed or recorded, recorded=recorded)


class Outputs:
    """One rank's: its metrics, through the writers that the configuration names, and with a header the trace.

    first_step: where the run begins or goes on. Raises InputError where a folder cannot be written.
    """

    def __init__(self, config: TrainConfig, *, rank: int, first_step: int, header: TraceHeader | None) -> None:
        self._config, self._rank, trace_out = config, rank, config.trace_out
        self._writers = open_writers(config, rank=rank, first_step=first_step)
        self._trace = TraceWriter(trace_out.folder, header) if trace_out and header else None

    def write(self, result: StepResult, masks: LayerMasks | None) -> None:
        """Write what was observed of a step; takes the recorded patterns from `masks`."""
        observed, values = observed_of(self._config, result.step), result.values()
        with self._naming_what_failed(result.step, self._config.metrics):
            for writer in self._writers if observed.measured else ():
                writer.write(result.step, values)
        if observed.recorded and masks is not None:
            records = masks.take_records()
            if self._trace is not None and (not self._trace.steps or result.step > self._trace.steps[-1]):
                with self._naming_what_failed(result.step, self._config.trace_out):
                    self._trace.append(result.step, records)  # a resumed run passes steps again: they are equal

    @contextmanager
    def _naming_what_failed(self, step: int, section: MetricsSection | TraceOutSection | None) -> Iterator[None]:
        """Raise NotWritten, in one line, where what a step did cannot be written: a disk is full, or gone."""
        try:
            yield
        except OSError as error:
            where = error.filename or (section and section.folder)
            told = f"what rank {self._rank} measured could not be written to {where}: {error.strerror or error}"
            raise NotWritten(f"step {step}: {told}") from error

    def close(self) -> None:
        """Close all files."""
        for output in (*self._writers, *filter(None, [self._trace])):
            output.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
