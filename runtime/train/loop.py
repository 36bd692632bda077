"""The training loop: one optimizer step at a time, watched, stopped before a broken gradient reaches the parameters.

Shape legend: S_own tokens of this rank's shard; world = replicas × ranks that share a sequence.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ...kernels.mask import AttentionMask
from ..attention.bound import BoundPlan, bind
from ..attention.graphs.graphs import Graphs
from ..attention.graphs.setting import graphs_for
from ..attention.planned import PlannedAttention
from ..baselines.flash4 import NAME as FLASH4_RING
from ..baselines.ring import ZigzagAttention
from ..baselines.torch_ring import TorchContextParallel
from ..comm.mesh import Mesh, agree, naming_lost_ranks
from ..comm.reuse import common_group
from ..data.shards import TokenSequence
from ..experts.load import ExpertLoad
from ..hf.capture import trace_header
from ..model.attached import Attached, Attention
from ..model.router_loss import router_loss_of
from ..model.shape import decoder_layers
from ..timing.spans import Clock, Exposure, TimedAttention
from .batch import Microbatch, cut
from .checkpoint import Checkpointer
from .metrics import Outputs, StepResult, measured_values, observed_of
from .model import build_model, master_dtype, shard_model
from .optimizer import (
    FiniteWatch,
    GradientNorms,
    TrainingError,
    clip_gradients,
    gradient_norms,
    learning_rate,
    make_optimizer,
)
from .patterns import NOTHING, LayerMasks, Observed
from .selfcheck.check import Given, SelfCheck
from .setup import Setup

_made = itertools.count(1)  # all ranks make theirs in the same order


class Trainer:
    """One rank of a training run. Making it is collective over all processes of `world`.

    replayed: one mask a layer, used in place of what the plan chooses while choosing is still paid (benchmarks).
    Raises InputError when ranks differ in configuration or plan.
    """

    def __init__(self, setup: Setup, world: Mesh, *, replayed: Sequence[AttentionMask] | None = None) -> None:
        topic = f"training {next(_made)}"
        self.setup, self.world, self.config = setup, world, setup.config
        agree(world, f"{topic} configuration", setup.config.digest)
        agree(world, f"{topic} facts", str(sorted(setup.run_facts().items())))
        self.mesh = world.replica_of(setup.config.parallel.context)
        self.clock, self.exposure = Clock(world.device), Exposure(world.device)
        self.hf_model = build_model(
            setup.config.model, setup.model_config, device=world.device, dtype=master_dtype(setup.config),
            seed=setup.config.seed,
        )  # fmt: skip
        self.masks: LayerMasks | None = None
        self.graphs: Graphs | None = None
        self._bound: BoundPlan | None = None
        attention = self._attention(replayed)
        device_mesh = init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("all",))
        self.model = shard_model(self.hf_model, setup.config, device_mesh)
        own = torch.from_numpy(setup.plan.make_placement().positions(self.mesh.rank)).to(world.device)
        is_token = own < setup.config.seq_len_tokens
        self.attached = Attached(
            self.hf_model, TimedAttention(attention, self.clock), self.masks and self.masks.of_layer, positions=own,
            seq_len_tokens=setup.config.seq_len_tokens,
            router=router_loss_of(self.hf_model, is_token, _over_all_ranks),
        )  # fmt: skip
        self.load: ExpertLoad | None = None
        if setup.config.metrics is not None and setup.config.metrics.expert_load:
            self.load = ExpertLoad(self.hf_model, is_token, _over_all_ranks)
        self.watch = FiniteWatch(decoder_layers(self.hf_model), world.device)
        self.optimizer = make_optimizer(self.model, setup.config.optimizer)
        self._group = common_group(self.mesh, "comparing")
        self.check = self._self_check(attention)
        section = setup.config.checkpoint
        self.checkpoints = Checkpointer(section, world, facts=setup.run_facts()) if section else None
        self.next_step = 0

    def resume(self) -> int:
        """Go on from the newest checkpoint, if there is one and it is wanted; return the next step. Collective."""
        if self.checkpoints is not None and self.checkpoints.section.resume:
            newest = self.checkpoints.newest()
            if newest is not None:
                manifest = self.checkpoints.load(newest, self.hf_model, self.optimizer)
                self.setup.check_resumed(manifest, source=newest)
                self.next_step = manifest["step"]
        return self.next_step

    def run(
        self, report: Callable[[StepResult], None] = lambda result: None, *, stop_before: int | None = None
    ) -> list[StepResult]:
        """Train to the configured number of steps, with metrics, trace and checkpoints. Collective.

        stop_before: leave the run there, to be resumed; the learning rate stays that of the whole run.
        """
        config, section = self.config, self.config.checkpoint
        last = config.steps if stop_before is None else min(stop_before, config.steps)
        header = None
        if config.trace_out is not None and self.world.rank == 0:
            header = trace_header(
                self.hf_model, model_id=config.model.path.name, seq_len_tokens=config.seq_len_tokens,
                block_size=self.setup.plan.block_size, seed=config.seed, audited=self.setup.audited,
            )  # fmt: skip
        outputs = Outputs(config, rank=self.world.rank, first_step=self.next_step, header=header)
        results: list[StepResult] = []
        try:
            while self.next_step < last:
                with naming_lost_ranks(self.world):
                    results.append(self.step(observed_of(config, self.next_step)))
                    outputs.write(results[-1], self.masks)
                    done = self.next_step
                    if section and self.checkpoints and (done % section.every_steps == 0 or done == config.steps):
                        self.checkpoints.save(done, self.hf_model, self.optimizer)
                report(results[-1])
            if self.checkpoints is not None:
                self.checkpoints.finish()
        finally:
            outputs.close()
        return results

    def step(self, observed: Observed = NOTHING) -> StepResult:
        """Do one optimizer step; what is observed goes into the result, or waits for `masks.take_records`."""
        began, config = time.perf_counter(), self.config
        batches = [self._microbatch(number) for number in range(config.microbatches)]
        valid = torch.tensor(sum(batch.valid for batch in batches), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(valid)
        self.watch.reset()
        check = self.check if self.check is not None and self.check.is_due(self.next_step) else None
        if check is not None:
            check.begin(self.next_step)
        self.exposure.on = observed.measured and (self.graphs is None or observed.exposed)
        if self.graphs is not None:
            self.graphs.paused = self.exposure.on
        if self.load is not None:
            self.load.on = observed.measured
        losses = self._forward_backward(batches, valid, observed)
        norms = gradient_norms(self.hf_model.named_parameters())
        loss, router_loss, norm = self._checked(losses, valid, norms)
        if check is not None:
            check.judge(self.next_step, Given(batch=batches[0], sequence=self._sequence(0)), self.mesh)
        rate = learning_rate(self.next_step, config.optimizer, config.steps)
        clip_gradients(self.hf_model.parameters(), norms.total, config.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.clock.take_ms()  # waits for the device
        seconds = time.perf_counter() - began
        self.next_step += 1
        if self.check is not None:
            self.check.after(self.next_step)
        return StepResult(
            step=self.next_step - 1, loss=loss, router_loss=router_loss, grad_norm=norm, learning_rate=rate,
            valid_tokens=int(valid.item()), tokens=config.sequences_per_step * config.seq_len_tokens, seconds=seconds,
            parts_ms=parts, extra=self._measured(seconds) if observed.measured else {},
        )  # fmt: skip

    def close(self) -> None:
        """Give the model its own attention back."""
        self.attached.detach()
        if self.load is not None:
            self.load.detach()

    def _attention(self, replayed: Sequence[AttentionMask] | None) -> Attention:
        if self.config.attention in ("dense-zigzag", FLASH4_RING):
            kernel = "flash4" if self.config.attention == FLASH4_RING else None
            return ZigzagAttention(self.mesh, kernel=kernel, waiting=self.exposure.waiting)
        if self.config.attention == "torch-context-parallel":
            return TorchContextParallel(self.mesh)
        self._bound = bound = bind(self.setup.plan, self.mesh)
        self.graphs = graphs_for(bound, self.config.plan.cuda_graphs)
        planned = PlannedAttention(bound, graphs=self.graphs)
        planned.waiting = self.exposure.waiting
        self.masks = LayerMasks(
            bound, trace=self.setup.trace, clock=self.clock, exposure=self.exposure, seed=self.config.seed,
            replayed=replayed, graphs=self.graphs,
        )  # fmt: skip
        return planned

    def _self_check(self, attention: Attention) -> SelfCheck | None:
        section = self.config.verify
        if section is None:
            return None
        layers = decoder_layers(self.hf_model)
        check = SelfCheck(self.setup, section, self.world, self._bound, self.model, layers, self.optimizer)
        if isinstance(attention, PlannedAttention):
            attention.watch, attention.poisons = check.attention, section.poison
        return check

    def _microbatch(self, number: int) -> Microbatch:
        """Return this rank's shard of one sequence of the next step: a pure function of configuration and place."""
        sequence = self._sequence(number)
        return cut(self.config, sequence, self.setup.plan, rank=self.mesh.rank, device=self.world.device)

    def _sequence(self, number: int) -> TokenSequence:
        """Return the whole sequence of a microbatch of the next step."""
        config = self.config
        return self.setup.data.at_step(
            self.next_step, number * config.parallel.data + self.mesh.replica, slots=config.sequences_per_step,
            seq_len_tokens=config.seq_len_tokens, seed=config.seed,
        )  # fmt: skip

    def _forward_backward(self, batches: list[Microbatch], valid: Tensor, observed: Observed) -> Tensor:
        """Accumulate the gradients of the step's loss; return float64 [2] of this rank: its summed token losses, and
        its part of the routers' loss, whose mean over microbatches counts.
        """
        # FSDP averages gradients over all processes; what is wanted is their sum over the number of valid tokens.
        factor = self.world.world_size / valid.clamp(min=1.0)
        losses, router = torch.zeros(2, dtype=torch.float64, device=self.world.device), self.attached.router
        for number, batch in enumerate(batches):
            if self.masks is not None:
                self.masks.documents = batch.documents
                self.masks.observed = observed if number == 0 else NOTHING
                choose = self.config.plan.choose
                self.masks.again = not choose.chooses_at(self.next_step)
                self.masks.keeping = number == 0 and not choose.always
                self.masks.dense = choose.dense_at(self.next_step)
            self.attached.positions.expect(batch.position_ids if self.config.data.documents.positions else None)
            part = self.model(batch.input_ids, batch.position_ids, batch.labels)
            losses[0] += part.detach()
            weighted = part * factor.to(part.dtype)
            if router is not None:
                part = router.take() / self.config.microbatches
                losses[1] += part.detach()
                weighted = weighted + part * (router.coefficient * self.world.world_size)
            weighted.backward()
        return losses

    def _checked(
        self, losses: Tensor, valid: Tensor, norms: GradientNorms
    ) -> tuple[float | None, float | None, float]:  # fmt: skip
        """Return the step's loss, that of its routers and the gradient norm, the same on every rank.

        TrainingError when the gradient is not finite, or ranks chose different patterns. RankLost when ranks are lost:
        what was waited for here may be what nobody sent.
        """
        dist.all_reduce(losses)
        own = self.masks.take_hash() if self.masks is not None else torch.zeros_like(valid, dtype=torch.int64)
        ends = torch.stack([own, ~own])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        same = (ends[0] == ~ends[1]).double()  # largest and smallest hash
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        loss, router_loss, norm, count, alike = torch.stack([*losses, norms.total, valid, same]).tolist()
        self.world.check()
        if not all(map(math.isfinite, (norm, loss, router_loss))):
            told = self.watch.diagnosis(norms)
            raise TrainingError(f"step {self.next_step}: {told}; the parameters are those before this step")
        if not alike:
            raise TrainingError(f"step {self.next_step}: ranks chose different patterns (their hashes differ)")
        return (loss / count if count else None), (None if self.attached.router is None else router_loss), norm

    def _measured(self, seconds: float) -> dict[str, Any]:
        loads = None if self.masks is None else self.masks.take_loads()
        seen_into = self.config.attention != "torch-context-parallel"  # PyTorch's own ring is not
        values = measured_values(
            self.config, self.setup.facts, self.setup.plan, self.world, seconds=seconds, loads=loads
        )  # fmt: skip
        values |= {} if self.load is None else self.load.take()
        if not self.config.plan.choose.always:
            values["patterns_of_step"] = self.config.plan.choose.chosen_in(self.next_step - 1)
        if self.config.plan.choose.sometimes_dense:
            values["dense"] = self.config.plan.choose.dense_at(self.next_step - 1)
        measured = seen_into and self.exposure.on
        return values | {"exposed_communication_ms": self.exposure.take_ms() if measured else None}


def _over_all_ranks(counts: Tensor) -> Tensor:
    """Add up what was counted of a microbatch's sequences, one of each replica, or of all of a step's."""
    dist.all_reduce(counts)
    return counts
