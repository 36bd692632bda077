"""A whole run, estimated: the configured step beside the same step with dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....planner.cost.cluster import Cluster
from ....planner.plan import Plan
from ....planner.step.parts import AttentionTimes, StepEstimate, estimate_step
from ....traces.dataset.store import Trace
from ....traces.errors import InputError
from ....traces.progress import Progress, no_progress
from ..config import ChooseSection, TrainConfig
from ..model import ModelFacts, model_facts, read_model_config
from ..plan import dense_plan, resolve_plan
from .attention import LayerTimes, SimulatePlan, dense_layer, sparse_layer
from .memory import memory_bytes
from .sizes import step_settings, transformer_sizes

DENSE = "dense-zigzag"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute the run's attention. memory_bytes: of one rank, by purpose, and their "total"."""

    name: str
    step: StepEstimate
    layer: LayerTimes
    memory_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """The configured run, and with dense attention (the same, where that is what is configured)."""

    config: TrainConfig
    cluster: Cluster
    configured: Arm
    dense: Arm

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Both, or one where they are the same."""
        return (self.dense,) if self.configured is self.dense else (self.configured, self.dense)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        ranks, steps = self.config.parallel.world_size, self.config.steps
        return {
            "cluster": self.cluster.name,
            "origin": self.cluster.origin,
            "ranks": ranks,
            "steps": steps,
            "arms": [
                {
                    "attention": arm.name,
                    "step_us": arm.step.us,
                    "parts": [{"name": one.name, "us": one.us, "basis": one.basis} for one in arm.step.parts],
                    "tokens_per_s": arm.step.tokens_per_s,
                    "gpu_hours": arm.step.gpu_hours(steps=steps, ranks=ranks),
                    "memory_bytes_per_rank": arm.memory_bytes,
                    "layers_simulated": arm.layer.layers,
                    "spread_of_layers": arm.layer.spread,
                }
                for arm in self.arms
            ],
        }


def estimate_run(
    config: TrainConfig, cluster: Cluster, simulate: SimulatePlan, *, trace: Trace | None = None,
    most_layers: int = 4, choosing_us: float = 0.0, progress: Progress = no_progress,
) -> RunEstimate:  # fmt: skip
    """Estimate a configured run on a cluster. Needs no data, no weights and no GPU.

    trace: the patterns that a plan which chooses its own is expected to choose. choosing_us: of one layer, as measured;
    the step has the mean of all steps, in some of which nothing may be chosen. Raises InputError, in one line, for what
    cannot be used or has no prices.
    """
    ranks = config.parallel.world_size
    if ranks > cluster.world_size:
        raise InputError(f"{ranks} ranks are configured, {cluster.name} has {cluster.world_size} GPUs",
                         field="parallel")  # fmt: skip
    model_config = read_model_config(config.model)
    facts = model_facts(model_config)
    run = _Run(config=config, cluster=cluster, model_config=model_config, facts=facts)
    zigzag = _with_attention(config, DENSE)
    if config.attention != "planned":
        resolve_plan(config, facts.shape, device="cuda")  # refuses what it does not compute
    plan = dense_plan(zigzag, facts.shape)
    dense = run.arm(zigzag, plan, dense_layer(plan, cluster, simulate), choosing_us=0.0)
    if config.attention != "planned":
        return RunEstimate(config=config, cluster=cluster, configured=dense, dense=dense)
    plan, replayed, _ = resolve_plan(config, facts.shape, device="cuda")
    patterns = replayed or trace
    if patterns is None:
        raise InputError("the run chooses its patterns, and what they cost depends on them: give one captured from "
                         "this model at this length", field="--trace")  # fmt: skip
    layer = sparse_layer(plan, patterns, cluster, simulate, most_layers=most_layers, progress=progress)
    return RunEstimate(
        config=config, cluster=cluster, configured=run.arm(config, plan, layer, choosing_us=choosing_us), dense=dense
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    config: TrainConfig
    cluster: Cluster
    model_config: Any
    facts: ModelFacts

    def arm(self, config: TrainConfig, plan: Plan, layer: LayerTimes, *, choosing_us: float) -> Arm:
        """Return the run with one way to compute attention. layer, choosing_us: of one layer in a step that chooses."""
        layers = self.facts.shape.layers
        settings = step_settings(config, self.model_config, self.facts, plan)
        attention = AttentionTimes(
            forward_us=layer.forward_us * layers,
            backward_us=layer.backward_us * layers,
            choosing_us=choosing_us * layers * config.plan.choose.choosing_steps(config.steps) / config.steps,
        )
        step = estimate_step(
            transformer_sizes(self.model_config, self.facts), settings, self.cluster, attention,
            tokens=config.sequences_per_step * config.seq_len_tokens,
        )  # fmt: skip
        memory = memory_bytes(config, self.model_config, self.facts, plan)
        return Arm(name=config.attention, step=step, layer=layer, memory_bytes=memory)


def _with_attention(config: TrainConfig, attention: str) -> TrainConfig:
    """Return the run with a baseline's attention, its plan and its trace left out."""
    plain = config.plan.model_copy(update={"file": None, "trace": None, "choose": ChooseSection()})
    return config.model_copy(update={"attention": attention, "plan": plain, "trace_out": None, "device": "cuda"})
