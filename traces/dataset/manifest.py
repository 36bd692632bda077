"""The manifest of a trace: what was recorded, from what, and the digest of every part.

`manifest.json` carries its own digest (SHA-256 of its canonical JSON without `digest`), so that a flipped bit in it is
seen before anything in it is believed. It holds no text and no token ids.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from ..errors import InputError
from ..files import read_sealed, sealed, write_json
from ..validation import validation_error
from .layer_limits import LAYER_LIMITS, LayerTokens, limit_of_layers

TRACE_SCHEMA_VERSION = 3
SchemaVersion = Literal[1, 2, 3]  # 1: before windows, 2: before documents apart; read, and continued so
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_MANIFEST_VALUES = 2 << 20
MAX_SEQ_LEN_TOKENS = 1 << 27
MAX_LAYERS = MAX_HEADS = MAX_HEAD_DIM = 4096
MAX_PART_BYTES = 4 << 30

Model = TypeVar("Model", bound=BaseModel)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A bare name and nothing else: a manifest must not be able to point outside its folder.
PartName = Annotated[str, Field(pattern=r"^part-[0-9]{8,12}\.parquet$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelShape(_Record):
    """Which model was recorded, and the shape of its attention.

    windows: by layer, the sliding window that the model itself has there, in tokens, 0 for none; None: none anywhere
    chunks:  by layer, tokens of a chunk where query and key must lie in the same one, 0 for none; None: none anywhere
    softcap: attention scores are softcap * tanh(score / softcap); None: as they are
    """

    model_id: str = Field(min_length=1, max_length=1024)
    layers: int = Field(ge=1, le=MAX_LAYERS)
    heads: int = Field(ge=1, le=MAX_HEADS)
    kv_heads: int = Field(ge=1, le=MAX_HEADS)
    head_dim: int = Field(ge=1, le=MAX_HEAD_DIM)
    windows: LayerTokens = None
    chunks: LayerTokens = None
    softcap: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator(*LAYER_LIMITS)
    @classmethod
    def _one_a_layer(cls, tokens: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        return limit_of_layers(tokens, info.data.get("layers"))

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        return self


class TraceHeader(_Record):
    """What all parts of one trace share; a writer that appends must bring the same.

    recorded_layers: the layers that each part holds, ascending
    origin:          "real" (a model ran) or "synthetic" (drawn from a seed)
    versions:        library name -> version that wrote the trace
    audit_sha256:    of the model (class, settings, sequence length) that the runtime's audit found right to split over
                     ranks; None for synthetic traces, which no model made
    """

    model: ModelShape
    recorded_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    seq_len_tokens: int = Field(ge=1, le=MAX_SEQ_LEN_TOKENS)
    block_size: int = Field(ge=1, le=1 << 20)
    origin: Literal["real", "synthetic"]
    seed: int = Field(ge=0)
    versions: dict[str, str] = Field(default_factory=dict)
    audit_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _layers_in_order(self) -> Self:
        if list(self.recorded_layers) != sorted(set(self.recorded_layers)):
            raise ValueError("recorded_layers must ascend without repeats")
        if self.recorded_layers[-1] >= self.model.layers:
            raise ValueError(f"recorded_layers has {self.recorded_layers[-1]} in a model of {self.model.layers} layers")
        return self

    @property
    def rows_per_part(self) -> int:
        """One row per (recorded layer, head)."""
        return len(self.recorded_layers) * self.model.heads


class TracePart(_Record):
    """One Parquet file: all recorded layers and heads of one training step.

    document_starts_tokens: where packed documents begin, the first at 0; None when the step is one document
    """

    file: PartName
    sha256: Sha256
    training_step: int = Field(ge=0, lt=10**12)
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1, le=MAX_PART_BYTES)
    document_starts_tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)


class TraceManifest(_Record):
    """The whole of `manifest.json`."""

    schema_version: SchemaVersion = TRACE_SCHEMA_VERSION
    kind: Literal["sparsering-trace"] = "sparsering-trace"
    digest: Sha256
    header: TraceHeader
    parts: tuple[TracePart, ...] = ()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        steps = [part.training_step for part in self.parts]
        if steps != sorted(set(steps)):
            raise ValueError("parts must ascend in training_step without repeats")
        if len({part.file for part in self.parts}) != len(self.parts):
            raise ValueError("parts must not name a file twice")
        for part in self.parts:
            _check_part(part, self.header)
        for name in (*LAYER_LIMITS, "softcap"):
            if self.schema_version == 1 and getattr(self.header.model, name) is not None:
                raise ValueError(f"schema_version is 1, which has no header.model.{name}")
        return self


def _check_part(part: TracePart, header: TraceHeader) -> None:
    if part.rows != header.rows_per_part:
        raise ValueError(f"{part.file} has {part.rows} rows, {header.rows_per_part} (layers × heads) are expected")
    starts = part.document_starts_tokens
    if starts is None:
        return
    if starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueError(f"{part.file}: document_starts_tokens must ascend from 0")
    if starts[-1] >= header.seq_len_tokens:
        raise ValueError(f"{part.file}: document_starts_tokens has {starts[-1]} in {header.seq_len_tokens} tokens")


def make_manifest(
    header: TraceHeader, parts: tuple[TracePart, ...], *, schema_version: SchemaVersion = TRACE_SCHEMA_VERSION
) -> TraceManifest:
    """Return the manifest of these parts, its digest included; InputError when they do not fit together."""
    raw: dict[str, Any] = {
        "schema_version": schema_version,
        "kind": "sparsering-trace",
        "header": header.model_dump(mode="json"),
        "parts": [part.model_dump(mode="json") for part in parts],
    }
    return parse_model(TraceManifest, sealed(raw), source=MANIFEST_NAME)


def write_manifest(folder: Path, manifest: TraceManifest) -> None:
    """Write `manifest.json` into the folder, atomically."""
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def read_manifest(folder: Path) -> TraceManifest:
    """Read and check `manifest.json`: schema version, then digest, then every field; InputError in one line."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError("is not a trace: it holds no manifest.json", source=folder)
    raw = read_sealed(path, newest_schema=TRACE_SCHEMA_VERSION, max_bytes=MAX_MANIFEST_BYTES,
                      max_values=MAX_MANIFEST_VALUES)  # fmt: skip
    return parse_model(TraceManifest, raw, source=path)


def parse_model(model: type[Model], value: Any, *, source: str | Path | None = None) -> Model:
    """Validate JSON-like `value` as the pydantic `model`; the first problem becomes a one-line InputError."""
    try:
        return model.model_validate_json(json.dumps(value, allow_nan=False))
    except ValidationError as error:
        raise validation_error(error, source, model) from error


def library_versions(*packages: str) -> dict[str, str]:
    """Return package -> installed version, for the header; packages that are not installed are left out."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
