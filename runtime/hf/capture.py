"""Recording what a model attends to: any Hugging Face causal LM, through transformers' attention interface.

At every layer the hook sees queries and keys after position encoding, lets a selector choose patterns from them,
measures the attention that these keep, hands the layer to the trace, and returns real attention (dense, or sparse by
the chosen pattern), so that the next layer sees the hidden states it should.

Shapes as in `kernels.mask`: q [B, S, H, D], k and v [B, S, H_kv, D]; B is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...kernels.api import full_attention
from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ShardTensors, kept_mass_probe, kept_mass_sampled
from ...planner.backends import computed_head_dim
from ...traces.dataset.manifest import ModelShape, TraceHeader, library_versions, parse_model
from ...traces.dataset.rows import HeadChoice
from ...traces.dataset.store import StepWriter, TraceWriter
from ...traces.errors import InputError, UnsupportedError
from ...traces.pattern import BlockMask, HeadPattern, LayerPattern, VerticalSlash
from ...traces.progress import Progress, no_progress
from ..attention.selectors import Selector
from ..audit.audit import Audit, require_model
from ..model.attention_call import check_attention_call, refuse_masks
from ..model.shape import check_angles, model_body, model_shape

# transformers gives names that contain "flash" or "sdpa" a meaning of its own; this one has none.
ATTENTION_NAME = "sparsering_capture"
SAMPLED_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """What is done at each layer.

    seed:         of the rows that kept_mass_sampled looks at (the same for all layers of a step)
    sampled_rows: how many of them
    sparse:       continue with sparse attention by the chosen pattern, rather than with dense attention
    backend:      kernels of sparse attention; None: triton on a GPU, blockwise elsewhere
    """

    selector: Selector
    seed: int = 0
    sampled_rows: int = SAMPLED_ROWS
    sparse: bool = False
    backend: str | None = None


def trace_header(
    model: PreTrainedModel,
    *,
    model_id: str,
    seq_len_tokens: int,
    block_size: int,
    seed: int = 0,
    layers: tuple[int, ...] | None = None,
    audited: Audit | None = None,
) -> TraceHeader:
    """Return the header of a trace of this model.

    layers: which to record, all by default. audited: the model's audit where it was made already. Raises InputError if
    impossible, UnsupportedError with the reason when the model does not pass the audit.
    """
    audited = audited or require_model(model, seq_len_tokens=seq_len_tokens, allow_hooks=True)
    stated = model_shape(model.config)
    shape: dict[str, Any] = {"model_id": model_id} | stated.model_dump()
    parse_model(ModelShape, shape)
    return parse_model(
        TraceHeader,
        {
            "model": shape,
            "recorded_layers": list(range(stated.layers)) if layers is None else list(layers),
            "seq_len_tokens": seq_len_tokens,
            "block_size": block_size,
            "origin": "real",
            "seed": seed,
            "audit_sha256": audited.model_sha256,
            "versions": library_versions("sparsering", "torch", "transformers", "pyarrow"),
        },
    )


def capture_model(
    model: PreTrainedModel,
    token_ids: Tensor,
    writer: TraceWriter,
    settings: CaptureSettings,
    *,
    training_step: int | None = None,
    progress: Progress = no_progress,
) -> int:
    """Run the model on one sequence and append what it attends to as one training step; return that step.

    token_ids: [S] or [1, S], on any device; S is the trace's seq_len_tokens. training_step: the next one by default.
    The model runs without gradients in eval mode and is left as it was. Nothing is written when the run fails.
    Raises UnsupportedError with the reason when the model does not pass the audit (`audit.py`): no plan could run it.
    """
    header = writer.header
    ids = token_ids.reshape(1, -1)
    if ids.shape[1] != header.seq_len_tokens:
        raise InputError(f"has {ids.shape[1]} tokens, the trace {header.seq_len_tokens}", field="token_ids")
    check_angles(model)
    require_model(model, seq_len_tokens=header.seq_len_tokens, allow_hooks=True)
    if settings.sparse:
        _check_kernels(model, settings, header)
    step_number = writer.next_step if training_step is None else training_step
    with writer.step(step_number) as step, _attention_replaced(model):
        recorder = _Recorder(step, settings, progress)
        with _active(recorder), torch.no_grad():
            # The body without the head: logits of long sequences are large and nobody looks at them.
            model_body(model)(input_ids=ids.to(model.device), use_cache=False)
    return step_number


def _check_kernels(model: PreTrainedModel, settings: CaptureSettings, header: TraceHeader) -> None:
    """Refuse heads that the kernels of sparse attention do not compute, before the first layer."""
    computed_head_dim(
        _backend(settings, model.device.type), head_dim=header.model.head_dim,
        dtype=str(model.dtype).removeprefix("torch."), block_size=header.block_size,
    )  # fmt: skip


def _backend(settings: CaptureSettings, device_type: str) -> str:
    return settings.backend or ("triton" if device_type == "cuda" else "blockwise")


def pattern_of(mask: AttentionMask) -> LayerPattern:
    """Return a mask's patterns on the host."""
    active = mask.active.cpu().numpy()
    columns = None if mask.columns is None else mask.columns.cpu().numpy()
    heads: list[HeadPattern] = []
    for head in range(mask.heads):
        chosen = np.zeros(0, np.int32) if columns is None else columns[head][columns[head] < mask.seq_len_tokens]
        if mask.is_toeplitz:
            heads.append(VerticalSlash(columns=chosen, diagonals=np.flatnonzero(active[head]).astype(np.int32)))
        else:
            assert not chosen.size, "no selector gives block pairs and columns at once"
            heads.append(BlockMask(bits=active[head]))
    documents = None if mask.documents is None else mask.documents.cpu().numpy()[: mask.seq_len_tokens]
    return LayerPattern(
        seq_len_tokens=mask.seq_len_tokens, block_size=mask.block_size, heads=tuple(heads), documents=documents
    )


class _Recorder:
    """Receives the layers of one forward pass in order."""

    def __init__(self, step: StepWriter, settings: CaptureSettings, progress: Progress) -> None:
        self.step, self.settings, self.progress = step, settings, progress
        self.seen = 0

    def layer(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Record one layer and return its attention [1, S, H, D]."""
        if q.shape[0] != 1:
            raise UnsupportedError(f"is {q.shape[0]}; one sequence at a time is captured", field="batch size")
        header = self.step.header
        wanted = number in header.recorded_layers
        mask = None
        if wanted or self.settings.sparse:
            shard = ShardTensors(
                q=q,
                k=k,
                positions=torch.arange(q.shape[1], device=q.device),
                seq_len_tokens=header.seq_len_tokens,
                block_size=header.block_size,
                granularity_tokens=q.shape[1],
            )
            mask = self.settings.selector.choose(shard, layer=number, scale=scale)
            if wanted:
                self.step.append(number, pattern_of(mask), self._choices(number, shard, mask, scale))
        self.seen += 1
        self.progress("capturing layers", self.seen, header.model.layers)
        if self.settings.sparse and mask is not None:
            backend = _backend(self.settings, q.device.type)
            return full_attention(q, k, v, mask, scale=scale, backend=backend)[0]
        return dense_causal(q, k, v, scale=scale)

    def _choices(self, layer: int, shard: ShardTensors, mask: AttentionMask, scale: float) -> list[HeadChoice]:
        probe = kept_mass_probe(shard, mask, scale=scale).clamp(max=1).tolist()
        sampled = kept_mass_sampled(shard, mask, scale=scale, seed=self.settings.seed, rows=self.settings.sampled_rows)
        recorded = self.settings.selector.recorded(layer, shard.heads)
        return [
            HeadChoice(selector=name, settings=values, kept_mass_probe=kept, kept_mass_sampled=kept_sampled)
            for (name, values), kept, kept_sampled in zip(recorded, probe, sampled.clamp(max=1).tolist(), strict=True)
        ]


def dense_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Return dense causal attention [1, S, H, D] without a score matrix in memory.

    One KV head at a time with its queries: keys and values are broadcast, not copied, and every fused kernel applies.
    """
    group = q.shape[2] // k.shape[2]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    for head in range(k.shape[2]):
        queries = slice(head * group, (head + 1) * group)
        keys, values = (x[:, :, head : head + 1].transpose(1, 2).expand(-1, group, -1, -1) for x in (k, v))
        part = scaled_dot_product_attention(q[:, :, queries].transpose(1, 2), keys, values, is_causal=True, scale=scale)
        out[:, :, queries] = part.transpose(1, 2)
    return out


_RECORDER: ContextVar[_Recorder | None] = ContextVar("sparsering_recorder", default=None)


@contextmanager
def _active(recorder: _Recorder) -> Iterator[None]:
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)


@contextmanager
def _attention_replaced(model: PreTrainedModel) -> Iterator[None]:
    """Put our hook in the place of the model's attention, in eval mode, and put everything back."""
    previous = model.config._attn_implementation or "eager"
    training = [(module, module.training) for module in model.modules()]
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        if model.config._attn_implementation != ATTENTION_NAME:
            raise UnsupportedError(f"{type(model).__name__} does not take its attention from outside", field="model")
        model.eval()
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        model.set_attn_implementation(previous)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: [B, H, S, D] in, [B, S, H, D] out."""
    check_attention_call(
        module, query, key, attention_mask, dropout=dropout, keywords=keywords, seq_len_tokens=query.shape[2]
    )
    recorder = _RECORDER.get()
    if recorder is None:
        raise RuntimeError("sparsering's capture hook was called outside capture_model")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return recorder.layer(int(getattr(module, "layer_idx")), q, k, v, scale), None  # noqa: B009 (not in Module's type)


AttentionInterface.register(ATTENTION_NAME, _attend)
AttentionMaskInterface.register(ATTENTION_NAME, refuse_masks)
