"""The configuration of a training run: one YAML file, every key checked before any work.

Units are in the names. Unknown keys, values of another type and values that contradict each other are one line that
names file, field and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator

from ...planner.layouts.layout import Layout
from ...planner.layouts.registry import make_layout
from ...planner.schedule.backends import facts_of
from ...planner.specs import MAX_SEQ_LEN_TOKENS, DType
from ...traces.errors import InputError
from ...traces.files import canonical_json, sha256_of_bytes
from ...traces.validation import validation_error
from ...traces.yaml_files import read_yaml, with_settings
from ..attention.graphs.words import GraphsSetting
from ..pattern.section import PatternSection

MAX_CONFIG_BYTES = 1 << 16
AttentionName = Literal["planned", "dense", "dense-zigzag", "dense-zigzag-flash4", "torch-context-parallel"]


def _rooted(path: Path, info: Any) -> Path:
    return (info.context or Path()) / path


RootedPath = Annotated[Path, AfterValidator(_rooted)]  # relative to the folder that is the validation's context


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(_Section):
    """path: a model folder (config.json, safetensors) or, with random_weights, a folder or file with a config alone.

    rope_parameters: takes the place of the config's, for example {rope_type: yarn, factor: 4.0, rope_theta: 1.0e6,
    original_max_position_embeddings: 32768}.
    """

    path: RootedPath
    random_weights: bool = False
    rope_parameters: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """The model folder, or the one that the config's file lies in."""
        return self.path if self.path.is_dir() else self.path.parent


class DocumentsSection(_Section):
    """Where document boundaries count: loss (no token is predicted across one), positions (restart), attention."""

    loss: bool = False
    positions: bool = False
    attention: bool = False


class DataSection(_Section):
    """folder: what `sparsering data` wrote."""

    folder: RootedPath
    documents: DocumentsSection = DocumentsSection()


class ParallelSection(_Section):
    """data: replicas that train on different sequences; context: ranks that share one sequence (the plan's world)."""

    data: int = Field(default=1, ge=1)
    context: int = Field(default=1, ge=1)

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.data * self.context


class ChooseSection(_Section):
    """Patterns are chosen in steps that are multiples of every_steps, and before until_step where that is given.

    In all other steps every layer uses those of the last such step again, of its first microbatch. In every
    dense_every_steps-th step, and from dense_from_step on, layers attend everything before a token instead of what
    would be chosen. Only for `attention: planned` with patterns that are chosen; patterns are used again only for
    sequences that are not packed.
    """

    every_steps: int = Field(default=1, ge=1)
    until_step: int | None = Field(default=None, ge=1)
    dense_every_steps: int | None = Field(default=None, ge=1)
    dense_from_step: int | None = Field(default=None, ge=1)

    def dense_at(self, step: int) -> bool:
        """Return whether layers attend everything in a step; every n-th is the last one of n steps."""
        every, first = self.dense_every_steps, self.dense_from_step
        return (every is not None and step % every == every - 1) or (first is not None and step >= first)

    def dense_steps(self, steps: int) -> int:
        """Return how many of the first `steps` steps are dense."""
        return sum(map(self.dense_at, range(steps)))

    def chooses_at(self, step: int) -> bool:
        """Return whether patterns are chosen in a step."""
        return step % self.every_steps == 0 and (self.until_step is None or step < self.until_step)

    def chosen_in(self, step: int) -> int:
        """Return the step whose patterns a step uses."""
        last = step if self.until_step is None else min(step, self.until_step - 1)
        return last - last % self.every_steps

    def choosing_steps(self, steps: int) -> int:
        """Return in how many of the first `steps` steps patterns are chosen: in dense ones only for later ones."""
        return self.chosen_in(steps - 1) // self.every_steps + 1 - (self.dense_steps(steps) if self.always else 0)

    @property
    def always(self) -> bool:
        """Whether patterns are chosen anew in every step that is not dense."""
        return self.every_steps == 1 and self.until_step is None

    @property
    def sometimes_dense(self) -> bool:
        """Whether any step may be dense."""
        return self.dense_every_steps is not None or self.dense_from_step is not None


class PlanSection(_Section):
    """file: a plan; without one, a default plan is made of what follows. trace: what a plan with patterns replays.

    pattern: how patterns are chosen when the plan is made here, in all layers or by rules for some.
    choose: in which steps patterns are chosen. cuda_graphs: play layers as CUDA graphs, which costs the host
    microseconds instead of milliseconds a layer; auto: where they can be and a rank's queries are small.
    layout: by name, as in plan files and `sparsering plan --layout`.
    layout_parameters: its own, as {chunks: 2, pull: true}; what is not given has the layout's default.
    """

    file: RootedPath | None = None
    trace: RootedPath | None = None
    pattern: PatternSection = PatternSection()
    layout: str = "gather"
    layout_parameters: dict[str, StrictBool | StrictInt] = Field(default_factory=dict)
    block_size: Literal[64, 128] = 128
    backend: str | None = None
    choose: ChooseSection = ChooseSection()
    cuda_graphs: GraphsSetting = "auto"

    def make_layout(self) -> Layout:
        """Return the default plan's layout; InputError, naming field and value, where there is none that fits."""
        return make_layout(self.layout, self.layout_parameters)

    @model_validator(mode="after")
    def _known_values(self) -> Self:
        self.make_layout()
        if self.backend is not None:
            facts_of(self.backend)
        return self


class OptimizerSection(_Section):
    """AdamW with fp32 states; the learning rate rises linearly over warmup_steps, then follows a cosine."""

    learning_rate: float = Field(default=3e-4, gt=0)
    minimum_share: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=100, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)


class MemorySection(_Section):
    """checkpoint_layers: recompute all of a layer but its attention; offload: what is kept waits in host memory.

    whole_layers: so many layers, the last ones, keep everything instead, where memory allows it. mlp_tiles: compute a
    layer's MLP in so many pieces of a rank's tokens, which takes that much less memory for its values.

    loss: liger-kernel's fused loss, or plain torch in chunks; fused_layers: liger-kernel's norms, rotation and MLP.
    """

    checkpoint_layers: bool = True
    offload: bool = False
    whole_layers: int = Field(default=0, ge=0)
    mlp_tiles: int = Field(default=1, ge=1, le=1024)
    fused_layers: bool = False
    loss: Literal["auto", "chunked", "liger"] = "auto"
    loss_chunk_tokens: int = Field(default=2048, ge=1)

    @model_validator(mode="after")
    def _offload_needs_checkpoints(self) -> Self:
        if self.offload and not self.checkpoint_layers:
            raise ValueError("offload needs checkpoint_layers")
        return self


class CheckpointSection(_Section):
    """folder: where; every_steps: how often; keep_last: how many; asynchronous: write while training goes on."""

    folder: RootedPath
    every_steps: int = Field(default=100, ge=1)
    keep_last: int = Field(default=2, ge=1)
    asynchronous: bool = True
    resume: bool = True


class TraceOutSection(_Section):
    """Every so many steps the live patterns are appended to a trace, from which the next plan can be made."""

    folder: RootedPath
    every_steps: int = Field(default=100, ge=1)


class VerifySection(_Section):
    """How a run checks itself: at its first step, then at every so many, before the optimizer's step.

    layers: so many random layers are looked into; rows: of each, so many queries and keys, spread over all ranks.

    poison: fill the buffers for other ranks' data with NaN before every layer, so that reading what was not sent again
    shows in every step; costs a pass over the buffers.
    """

    every_steps: int = Field(default=100, ge=1)
    rows: int = Field(default=64, ge=1, le=1 << 14)
    layers: int = Field(default=1, ge=1)
    poison: bool = False


class WandbSection(_Section):
    """A run of Weights & Biases. name: it makes one up where none is given; mode: offline runs are uploaded later."""

    project: str = Field(min_length=1, max_length=128)
    name: str | None = Field(default=None, min_length=1, max_length=128)
    mode: Literal["online", "offline", "disabled"] = "online"


class MetricsSection(_Section):
    """folder: one JSON-lines file per rank; tensorboard: also an event file of rank 0, where the package is present.

    wandb: also a run of Weights & Biases, of rank 0.

    kept_mass_every_steps: how often kept attention mass is weighed, which takes passes over all keys; None: only in
    the steps that are recorded for the trace.

    exposure_every_steps: how often waiting for other ranks is measured where layers are CUDA graphs: such a step is
    launched kernel by kernel. Elsewhere it is measured in every step that is written.

    expert_load: how often each expert of each layer is chosen, over all ranks, in every step that is written.
    """

    folder: RootedPath
    every_steps: int = Field(default=1, ge=1)
    kept_mass_every_steps: int | None = Field(default=None, ge=1)
    exposure_every_steps: int = Field(default=10, ge=1)
    expert_load: bool = False
    tensorboard: bool = False
    wandb: WandbSection | None = None
    peak_flops_per_device: float | None = Field(default=None, gt=0)


class TrainConfig(_Section):
    """The whole file."""

    model: ModelSection
    data: DataSection
    seq_len_tokens: int = Field(gt=1, le=MAX_SEQ_LEN_TOKENS)
    steps: int = Field(ge=1)
    attention: AttentionName = "planned"
    plan: PlanSection = PlanSection()
    parallel: ParallelSection = ParallelSection()
    microbatches: int = Field(default=1, ge=1)
    dtype: DType = "bfloat16"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    device: Literal["cpu", "cuda"] | None = None
    max_restarts: int = Field(default=0, ge=0)
    timeout_s: float = Field(default=600.0, gt=0)
    patience_s: float | None = Field(default=None, ge=0)
    optimizer: OptimizerSection = OptimizerSection()
    memory: MemorySection = MemorySection()
    checkpoint: CheckpointSection | None = None
    trace_out: TraceOutSection | None = None
    metrics: MetricsSection | None = None
    verify: VerifySection | None = VerifySection()

    @model_validator(mode="after")
    def _patience_ends_before_the_timeout(self) -> Self:
        if self.patience_s is not None and self.patience_s >= self.timeout_s:
            raise ValueError(f"patience_s {self.patience_s:g} is not less than timeout_s {self.timeout_s:g}")
        return self

    @model_validator(mode="after")
    def _baselines_have_no_plan(self) -> Self:
        if self.attention != "planned" and (self.plan.file or self.plan.trace or self.trace_out):
            raise ValueError(f"attention {self.attention!r} takes no plan, no trace and writes none")
        if self.dtype not in ("bfloat16", "float32", "float64"):
            raise ValueError(f"dtype {self.dtype!r} cannot be trained in: no loss scaling here")
        return self

    @model_validator(mode="after")
    def _patterns_can_stay(self) -> Self:
        choose, section = self.plan.choose, self.checkpoint
        if choose != ChooseSection() and self.attention != "planned":
            raise ValueError(f"plan.choose: attention {self.attention!r} chooses no patterns")
        if choose.always:
            return self
        if self.data.documents.attention:
            raise ValueError("plan.choose and data.documents.attention: patterns that are used again were chosen for "
                             "documents that lie elsewhere")  # fmt: skip
        if section is not None and section.every_steps % choose.every_steps:
            raise ValueError(f"checkpoint.every_steps {section.every_steps} is no multiple of plan.choose.every_steps, "
                             f"{choose.every_steps}, and checkpoints hold no patterns to go on with")  # fmt: skip
        if self.max_restarts and choose.until_step is not None and choose.until_step < self.steps:
            raise ValueError(f"max_restarts {self.max_restarts} with plan.choose.until_step {choose.until_step}: "
                             "checkpoints hold no patterns to go on with from there")  # fmt: skip
        return self

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step over all replicas."""
        return self.parallel.data * self.microbatches

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved configuration: all ranks must have the same."""
        return sha256_of_bytes(canonical_json(self.model_dump(mode="json")))


def load_config(path: Path, settings: Sequence[str] = ()) -> TrainConfig:
    """Read and check a YAML file; relative paths in it are relative to its folder. InputError in one line.

    settings: take the place of what the file says, each as `optimizer.learning_rate=1e-4`.
    """
    document = with_settings(read_yaml(path, max_bytes=MAX_CONFIG_BYTES), settings, source=path)
    if not isinstance(document, dict):
        raise InputError("must be a mapping of keys", source=path)
    return parse_config(document, source=path, base=path.parent)


def parse_config(document: dict[str, Any], *, source: Path | str = "config", base: Path = Path()) -> TrainConfig:
    """Check a configuration; relative paths are relative to `base`. InputError in one line."""
    try:
        return TrainConfig.model_validate(document, context=base)
    except ValidationError as error:
        raise validation_error(error, source, TrainConfig) from error
