"""The training loop: one optimizer step at a time, watched, stopped before a broken gradient reaches the parameters.

Shape legend: S_own tokens of this rank's shard; world = replicas × ranks that share a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ...kernels.mask import AttentionMask
from ...traces.dataset.store import TraceWriter
from ..attention.planned import Chooser, PlannedAttention
from ..baselines.flash4 import NAME as FLASH4_RING
from ..baselines.ring import ZigzagAttention
from ..baselines.torch_ring import TorchContextParallel
from ..comm.failures import naming_lost_ranks
from ..comm.mesh import Mesh, agree
from ..hf.capture import trace_header
from ..model.attached import Attached, Attention
from ..model.shape import decoder_layers
from ..timing.exposure import Exposure
from ..timing.spans import Clock, TimedAttention
from .batch import Microbatch, microbatch
from .checkpoint import Checkpointer
from .metrics import MetricsFile, TensorBoard, peak_flops, step_flops
from .model import FiniteWatch, build_model, master_dtype, shard_model
from .optimizer import GradientNorms, clip_gradients, gradient_norms, learning_rate, make_optimizer, set_learning_rate
from .patterns import LayerMasks, planned_masks
from .setup import Setup, check_facts

Source = Callable[[int], AttentionMask | Chooser]


class TrainingError(RuntimeError):
    """Training cannot go on: says at which step, and for a broken gradient, on which rank and in which layer."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did. loss: mean over all valid tokens of all ranks; None without any valid token."""

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


class Trainer:
    """One rank of a training run. Making it is collective over all processes of `world`.

    source: takes the place of the plan's patterns (benchmarks replay masks while choosing is still paid).
    Raises InputError when ranks differ in configuration or plan.
    """

    _made = 0

    def __init__(
        self, setup: Setup, world: Mesh, *, source: Callable[[PlannedAttention, Source], Source] | None = None
    ) -> None:
        Trainer._made += 1
        self.setup, self.world, self.config = setup, world, setup.config
        agree(world, f"training {Trainer._made} configuration", setup.config.digest)
        agree(world, f"training {Trainer._made} facts", str(sorted(setup.run_facts().items())))
        self.mesh = world.replica_of(setup.config.parallel.context)
        self.clock, self.exposure = Clock(world.device), Exposure(world.device)
        model = build_model(
            setup.config.model, setup.model_config, device=world.device, dtype=master_dtype(setup.config),
            seed=setup.config.seed,
        )  # fmt: skip
        self.hf_model = model
        self.masks: LayerMasks | None = None
        attention = self._attention(source)
        device_mesh = init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("all",))
        self.model = shard_model(model, setup.config, device_mesh)
        masks: Any = self.masks.of_layer if self.masks is not None else lambda layer: None
        own = torch.from_numpy(setup.plan.make_placement().positions(self.mesh.rank)).to(world.device)
        self.attached = Attached(
            model, TimedAttention(attention, self.clock), masks, positions=own,
            seq_len_tokens=setup.config.seq_len_tokens,
        )  # fmt: skip
        self.watch = FiniteWatch(decoder_layers(model), world.device)
        self.optimizer = make_optimizer(self.model, setup.config.optimizer)
        self._group = self.mesh.new_group(range(self.mesh.world_size))
        self.checkpoints = self._checkpointer()
        self.next_step = 0

    def resume(self) -> int:
        """Go on from the newest checkpoint, if there is one and it is wanted; return the next step. Collective."""
        section = self.config.checkpoint
        if self.checkpoints is not None and section is not None and section.resume:
            newest = self.checkpoints.newest()
            if newest is not None:
                manifest = self.checkpoints.load(newest, self.hf_model, self.optimizer)
                check_facts(manifest["facts"], self.setup.run_facts(), source=str(newest))
                self.next_step = manifest["step"]
        return self.next_step

    def run(
        self, report: Callable[[StepResult], None] = lambda result: None, *, stop_before: int | None = None
    ) -> list[StepResult]:
        """Train to the configured number of steps, with metrics, trace and checkpoints. Collective.

        stop_before: leave the run there, to be resumed; the learning rate stays that of the whole run.
        """
        last = self.config.steps if stop_before is None else min(stop_before, self.config.steps)
        outputs = _Outputs(self)
        results: list[StepResult] = []
        try:
            while self.next_step < last:
                step = self.next_step
                wanted = {"measured": outputs.measures(step), "weighed": outputs.weighs(step)}
                with naming_lost_ranks(self.world):
                    results.append(self.step(**wanted, recorded=outputs.records(step)))
                    outputs.write(results[-1])
                report(results[-1])
            if self.checkpoints is not None:
                self.checkpoints.finish()
        finally:
            outputs.close()
        return results

    def step(self, *, measured: bool = False, weighed: bool = False, recorded: bool = False) -> StepResult:
        """Do one optimizer step.

        measured: also density, imbalance and exposed communication; weighed: of a measured step also the kept mass;
        recorded: keep the patterns, with their kept mass, for the trace.
        """
        began = time.perf_counter()
        number = self.next_step
        batches = [self._microbatch(number, m) for m in range(self.config.microbatches)]
        valid = torch.tensor(sum(batch.valid for batch in batches), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(valid)
        self.watch.reset()
        self.exposure.on = measured
        loss_sum = self._forward_backward(batches, valid, measured=measured, weighed=weighed, recorded=recorded)
        norms = gradient_norms(self.hf_model.named_parameters())
        loss, norm, same = self._checked(number, loss_sum, valid, norms)
        if not same:
            raise TrainingError(f"step {number}: ranks chose different patterns (their hashes differ)")
        rate = learning_rate(number, self.config.optimizer, self.config.steps)
        clip_gradients(self.hf_model.parameters(), norms.total, self.config.optimizer.clip_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.clock.take_ms()  # waits for the device
        self.next_step += 1
        tokens = self.config.sequences_per_step * self.config.seq_len_tokens
        result = StepResult(
            step=number, loss=loss, grad_norm=norm, learning_rate=rate, valid_tokens=int(valid.item()), tokens=tokens,
            seconds=time.perf_counter() - began, parts_ms=parts,
        )  # fmt: skip
        if measured:
            result.extra.update(self._measured(result))
        return result

    def close(self) -> None:
        """Finish checkpoints and channels. Collective."""
        if self.checkpoints is not None:
            self.checkpoints.finish()
        self.attached.detach()

    def save(self) -> None:
        """Save a checkpoint of the state after the steps done so far. Collective."""
        assert self.checkpoints is not None
        self.checkpoints.save(self.next_step, self.hf_model, self.optimizer)

    def _attention(self, source: Callable[[PlannedAttention, Source], Source] | None) -> Attention:
        if self.config.attention in ("dense-zigzag", FLASH4_RING):
            kernel = "flash4" if self.config.attention == FLASH4_RING else None
            return ZigzagAttention(self.mesh, kernel=kernel, waiting=self.exposure.waiting)
        if self.config.attention == "torch-context-parallel":
            return TorchContextParallel(self.mesh)
        planned = PlannedAttention(self.setup.plan, self.mesh)
        planned.channels = self.exposure.channels(planned.channels)
        self.masks = planned_masks(
            self.setup.plan, self.mesh, planned.positions[self.mesh.rank], trace=self.setup.resolved.trace,
            clock=self.clock, seed=self.config.seed, exposure=self.exposure,
        )  # fmt: skip
        if source is not None:
            self.masks.source = source(planned, self.masks.source)
        return planned

    def _checkpointer(self) -> Checkpointer | None:
        section = self.config.checkpoint
        if section is None:
            return None
        return Checkpointer(
            section.folder, self.world, facts=self.setup.run_facts(), keep_last=section.keep_last,
            asynchronous=section.asynchronous,
        )  # fmt: skip

    def _microbatch(self, step: int, number: int) -> Microbatch:
        return microbatch(
            self.config, self.setup.data, self.setup.plan, step=step, number=number, replica=self.mesh.replica,
            rank=self.mesh.rank, device=self.world.device,
        )  # fmt: skip

    def _forward_backward(
        self, batches: list[Microbatch], valid: Tensor, *, measured: bool, weighed: bool, recorded: bool
    ) -> Tensor:
        """Accumulate gradients of the mean loss over all valid tokens; return this rank's summed loss."""
        # FSDP averages gradients over all processes; what is wanted is their sum over the number of valid tokens.
        factor = self.world.world_size / valid.clamp(min=1.0)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(batches):
            if self.masks is not None:
                self.masks.documents = batch.documents
                first = number == 0
                self.masks.watch, self.masks.weigh = first and measured, first and weighed
                self.masks.record = first and recorded
            self.attached.positions.expect(batch.position_ids if self.config.data.documents.positions else None)
            part = self.model(batch.input_ids, batch.position_ids, batch.labels)
            (part * factor.to(part.dtype)).backward()
            loss_sum += part.detach()
        return loss_sum

    def _checked(
        self, step: int, loss_sum: Tensor, valid: Tensor, norms: GradientNorms
    ) -> tuple[float | None, float, bool]:
        """Return (loss, gradient norm, whether ranks chose alike); TrainingError when the gradient is not finite.

        RankLost when ranks are lost: what was waited for here may be what nobody sent.
        """
        dist.all_reduce(loss_sum)
        own = self.masks.take_hash() if self.masks is not None else torch.zeros_like(valid, dtype=torch.int64)
        ends = torch.stack([own, ~own])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        same = (ends[0] == ~ends[1]).double()  # largest and smallest hash
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        loss, norm, count, alike = torch.stack([loss_sum, norms.total, valid, same]).tolist()
        self.world.check()
        if not torch.isfinite(torch.tensor([norm, loss])).all():
            raise TrainingError(f"step {step}: {self._diagnosis(norms)}; the parameters are those before this step")
        return (loss / count if count else None), norm, bool(alike)

    def _diagnosis(self, norms: GradientNorms) -> str:
        """Say which rank and layer broke first. Collective; every rank says the same."""
        flags = torch.tensor(self.watch.broken(), dtype=torch.int32, device=self.world.device)
        everyone = [torch.zeros_like(flags) for _ in range(self.world.world_size)]
        dist.all_gather(everyone, flags)
        broken = torch.stack(everyone).cpu().bool()  # [rank, output or gradient, layer]
        for direction, name in ((0, "the output"), (1, "the gradient of the output")):
            layers = broken[:, direction].any(0).nonzero()[:, 0].tolist()
            if layers:
                layer = min(layers) if direction == 0 else max(layers)
                ranks = broken[:, direction, layer].nonzero()[:, 0].tolist()
                return f"{name} of layer {layer} is not finite on rank {', '.join(map(str, ranks))}"
        return f"the gradient of {', '.join(norms.broken()[:4]) or 'the loss'} is not finite (on some rank)"

    def _measured(self, result: StepResult) -> dict[str, Any]:
        config, device = self.config, self.world.device
        loads = self.masks.take_loads() if self.masks is not None else {}
        means = {layer: sum(load.density) / len(load.density) for layer, load in loads.items()}
        mean = sum(means.values()) / len(means) if means else None
        exposed_ms = self.exposure.take_ms()
        kept = [sum(load.kept_mass) / len(load.kept_mass) for _, load in sorted(loads.items()) if load.kept_mass]
        flops = step_flops(self.setup.facts, self.setup.plan, sequences=config.sequences_per_step, density=mean)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, config.metrics.peak_flops_per_device if config.metrics else None)
        rate = None if peak is None or flops is None else result.seconds * peak * self.world.world_size
        return {
            "mfu_actual": None if rate is None or flops is None else flops.actual / rate,
            "mfu_dense_equivalent": None if rate is None or flops is None else flops.dense_equivalent / rate,
            "density": mean if loads else 1.0,
            "density_per_layer": [means[layer] for layer in sorted(means)],
            "density_per_head": [loads[layer].density for layer in sorted(loads)],
            "imbalance_per_layer": [loads[layer].imbalance for layer in sorted(loads)],
            "kept_mass": (sum(kept) / len(kept) if kept else None) if self.masks is not None else 1.0,
            "kept_mass_per_layer": kept,
            # PyTorch's own ring cannot be seen into.
            "exposed_communication_ms": None if config.attention == "torch-context-parallel" else exposed_ms,
            "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }


class _Outputs:
    """What a run writes as it goes: metrics of every rank, the trace of rank 0, checkpoints of all."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config = trainer, trainer.config
        world, section = trainer.world, trainer.config.metrics
        self._metrics = MetricsFile(section.folder, world.rank) if section is not None else None
        board = section is not None and section.tensorboard and world.rank == 0
        self._board = (
            TensorBoard(section.folder, first_step=trainer.next_step) if board and section is not None else None
        )
        self._writer = self._trace_writer() if world.rank == 0 else None

    def measures(self, step: int) -> bool:
        section = self._config.metrics
        return section is not None and step % section.every_steps == 0

    def weighs(self, step: int) -> bool:
        section = self._config.metrics
        every = section.kept_mass_every_steps if section is not None else None
        return every is not None and step % every == 0

    def records(self, step: int) -> bool:
        section = self._config.trace_out
        return section is not None and step % section.every_steps == 0

    def write(self, result: StepResult) -> None:
        trainer, checkpoint = self._trainer, self._config.checkpoint
        if self._metrics is not None and self.measures(result.step):
            self._metrics.write(rank=trainer.world.rank, **result.values())
        if self._board is not None and self.measures(result.step):
            self._board.write(result.step, result.values())
        if self.records(result.step) and trainer.masks is not None:
            records = trainer.masks.take_records()
            if self._writer is not None and (not self._writer.steps or result.step > self._writer.steps[-1]):
                self._writer.append(result.step, records)  # a resumed run passes recorded steps again: they are equal
        done = trainer.next_step
        if checkpoint is not None and (done % checkpoint.every_steps == 0 or done == self._config.steps):
            trainer.save()

    def close(self) -> None:
        for output in (self._metrics, self._board, self._writer):
            if output is not None:
                output.close()

    def _trace_writer(self) -> TraceWriter | None:
        section = self._config.trace_out
        if section is None:
            return None
        plan = self._trainer.setup.plan
        header = trace_header(
            self._trainer.hf_model, model_id=self._config.model.path.name, seq_len_tokens=plan.seq_len_tokens,
            block_size=plan.block_size, seed=self._config.seed, audited=self._trainer.setup.audited,
        )  # fmt: skip
        return TraceWriter(section.folder, header)
