"""The parts of a plan file: strict values that JSON holds, each checked when it is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ..traces.dataset.layer_limits import LAYER_LIMITS
from .schedule.backends import facts_of
from .schedule.shape import AttentionShape

DType = Literal["bfloat16", "float16", "float32", "float64"]
ELEMENT_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
SHA256 = "^[0-9a-f]{64}$"
# Beyond these a number is a mistake, and what follows from it would take memory without bound.
MAX_RANKS = MAX_LAYERS = MAX_HEADS = MAX_HEAD_DIM = 4096
MAX_SEQ_LEN_TOKENS = 1 << 27
MAX_BLOCK_SIZE = 1 << 20


class Strict(BaseModel):
    """A frozen value that refuses unknown fields, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelShape(Strict):
    """What a plan needs to know of the model.

    windows, chunks: of each layer, how far back the model itself lets it look, in tokens (0: no such limit): query i
    attends key j where i - j is less than the window, and where i // chunk equals j // chunk. None: no layer has any.
    softcap: attention scores are softcap * tanh(score / softcap). What is None is left out of the file.
    """

    layers: int = Field(gt=0, le=MAX_LAYERS)
    heads: int = Field(gt=0, le=MAX_HEADS)
    kv_heads: int = Field(gt=0, le=MAX_HEADS)
    head_dim: int = Field(gt=0, le=MAX_HEAD_DIM)
    windows: tuple[Annotated[int, Field(ge=0, le=MAX_SEQ_LEN_TOKENS, strict=True)], ...] | None = None
    chunks: tuple[Annotated[int, Field(ge=0, le=MAX_SEQ_LEN_TOKENS, strict=True)], ...] | None = None
    softcap: float | None = Field(default=None, gt=0)

    @field_validator("windows", "chunks", mode="after")
    @classmethod
    def _none_if_without(cls, tokens: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return tokens if tokens is not None and any(tokens) else None

    @model_validator(mode="after")
    def _of_every_layer(self) -> Self:
        for name in ("windows", "chunks"):
            tokens = getattr(self, name)
            if tokens is not None and len(tokens) != self.layers:
                raise ValueError(f"{name} are of {len(tokens)} layers, not of {self.layers}")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show what is said alone: refusals print whole shapes."""
        return ((name, value) for name, value in super().__repr_args__() if value is not None)

    def limits(self, layer: int, seq_len_tokens: int) -> dict[str, int]:
        """Return what limits a layer in a sequence of so many tokens: window_tokens, chunk_tokens; empty: nothing."""
        own = {"window_tokens": self.windows, "chunk_tokens": self.chunks}
        found = {name: lengths[layer] for name, lengths in own.items() if lengths is not None}
        return {name: tokens for name, tokens in found.items() if 0 < tokens < seq_len_tokens}

    def windows_within(self, seq_len_tokens: int) -> bool:
        """Whether any layer of the model has a window that a sequence of so many tokens is longer than."""
        return any(0 < window < seq_len_tokens for window in self.windows or ())

    def asked_of_elements(self, seq_len_tokens: int) -> list[tuple[str, object]]:
        """Return (field, value) of what asks for more than whole blocks of plain scores: windows and a softcap."""
        asked: list[tuple[str, object]] = []
        if self.windows_within(seq_len_tokens):
            asked.append(
                ("model.windows", next(window for window in self.windows or () if 0 < window < seq_len_tokens))
            )
        if self.softcap is not None:
            asked.append(("model.softcap", self.softcap))
        return asked

    def difference(self, other: ModelShape) -> tuple[str, str, str] | None:
        """Return (field, what it is here, what it is there) where only a limit of some layer differs; else None."""
        unlimited: dict[str, Any] = dict.fromkeys(map(str, LAYER_LIMITS))
        if self.model_copy(update=unlimited) != other.model_copy(update=unlimited):
            return None
        none = (0,) * self.layers
        for name in LAYER_LIMITS:
            pairs = zip(getattr(self, name) or none, getattr(other, name) or none, strict=True)
            for layer, (here, there) in enumerate(pairs):
                if here != there:
                    return name, f"{here} tokens in layer {layer}", f"{there}"
        return None


class AttentionSpec(Strict):
    """What is to be attended: a model, the length of its sequences, mask blocks, types, columns gathered at most."""

    model: ModelShape
    seq_len_tokens: int = Field(gt=0, le=MAX_SEQ_LEN_TOKENS)
    block_size: int = Field(gt=0, le=MAX_BLOCK_SIZE)
    dtype: DType
    columns_capacity: int = Field(ge=0, le=MAX_SEQ_LEN_TOKENS + MAX_BLOCK_SIZE)

    def shape_of(self, *, world_size: int, tokens_per_rank: int) -> AttentionShape:
        """Return the sizes that schedules are built from, on so many ranks with so many tokens each."""
        element_bytes = ELEMENT_BYTES[self.dtype]
        return AttentionShape(
            world_size=world_size,
            tokens_per_rank=tokens_per_rank,
            heads=self.model.heads,
            kv_heads=self.model.kv_heads,
            head_dim=self.model.head_dim,
            element_bytes=element_bytes,
            accumulator_bytes=max(4, element_bytes),
            columns_capacity=self.columns_capacity,
        )


class PlacementSpec(Strict):
    """A placement in the file. units: unit numbers in rank-major order, ranks * units per rank of them."""

    name: str
    world_size: int = Field(gt=0, le=MAX_RANKS)
    granularity_tokens: int = Field(gt=0, le=MAX_SEQ_LEN_TOKENS)
    units: tuple[int, ...]


MODEL = "model"  # in the place of a selector's name: a layer has the pattern that the model itself gives it


class SelectorSpec(Strict):
    """A selector by name, and its settings; or MODEL, where nothing is chosen."""

    selector: str
    settings: dict[str, Any] = Field(default_factory=dict)


class PatternSpec(Strict):
    """How patterns come about in a run: replayed from the trace with this digest, or chosen anew by a selector.

    by_layer: of each layer its own selector, in the place of one for all; left out of the file where there is none.
    listed: whether active blocks are listed one by one, as data gives them, rather than as diagonals: their indexes
    take memory. windowed: whether any pattern has a window that is exact to the token, which kernels that know whole
    blocks alone do not compute; left out of the file where it is not so.
    """

    source: Literal["trace", "choose"]
    selector: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    trace_sha256: str | None = Field(default=None, pattern=SHA256)
    listed: bool = False
    windowed: bool = False
    by_layer: tuple[SelectorSpec, ...] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.by_layer is not None and (self.source != "choose" or self.selector is not None or self.settings):
            raise ValueError("by_layer stands beside another way to choose patterns, or a trace that is replayed")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name not in ("windowed", "by_layer") or value}


class LaunchSpec(Strict):
    """M query rows, N keys, warps and stages of one kernel; tma: loads by descriptors; registers: a cap, or 0."""

    m: int = Field(gt=0)
    n: int = Field(gt=0)
    warps: int = Field(gt=0)
    stages: int = Field(gt=0)
    tma: bool
    registers: int = Field(default=0, ge=0)


class TunedLaunches(Strict):
    """What `sparsering doctor --kernels --tune` found on GPUs of one compute capability, for one shape."""

    capability: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    block_size: int = Field(gt=0)
    launches: dict[str, LaunchSpec]


class KernelSpec(Strict):
    """Kernel settings that every rank must share. tuned: launches to prefer where they were tuned for.

    backend "fastest" is settled where the plan runs, by all ranks alike: flash4 where it is installed and supported,
    else triton; blockwise without a GPU.
    """

    backend: str = "triton"
    tuned: TunedLaunches | None = None

    @field_validator("backend")
    @classmethod
    def _is_known(cls, backend: str) -> str:
        facts_of(backend)
        return backend
