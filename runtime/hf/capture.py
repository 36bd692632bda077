"""Recording what a model attends to: any Hugging Face causal LM, through transformers' attention interface.

At every layer the recorder sees queries and keys after position encoding, lets a selector choose patterns from them,
measures the attention that these keep, hands the layer to the trace, and returns real attention (dense, or sparse by
the chosen pattern), so that the next layer sees the hidden states it should.

Shapes as in `kernels.mask`: q [B, S, H, D], k and v [B, S, H_kv, D]; B is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ...kernels.api import full_attention
from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ShardTensors
from ...kernels.select.registry import Selector
from ...planner.schedule.backends import computed_head_dim
from ...traces.dataset.manifest import ModelShape, TraceHeader, library_versions, parse_model
from ...traces.dataset.rows import HeadChoice
from ...traces.dataset.writer import StepWriter, TraceWriter
from ...traces.errors import InputError, UnsupportedError
from ...traces.progress import Progress, no_progress
from ..audit.audit import require_model
from ..audit.result import Audit
from ..model.attached import Attached
from ..model.shape import check_angles, model_body, model_shape
from ..pattern.form import PLAIN, AttentionForm
from ..pattern.kept import SAMPLED_ROWS, measure_kept
from ..pattern.recorded import own_choice, own_pattern, pattern_of
from ..pattern.selectors import chosen_mask


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """What is done at each layer.

    seed:         of the rows that kept_mass_sampled looks at (the same for all layers of a step)
    sampled_rows: how many of them
    sparse:       continue with sparse attention by the chosen pattern, rather than with dense attention
    """

    selector: Selector
    seed: int = 0
    sampled_rows: int = SAMPLED_ROWS
    sparse: bool = False


def trace_header(
    model: PreTrainedModel, *, model_id: str, seq_len_tokens: int, block_size: int, seed: int = 0,
    layers: tuple[int, ...] | None = None, audited: Audit | None = None,
) -> TraceHeader:  # fmt: skip
    """Return the header of a trace of this model.

    layers: which to record, all by default. audited: the model's audit where it was made already. Raises InputError if
    impossible, UnsupportedError with the reason when the model does not pass the audit.
    """
    audited = audited or require_model(model, seq_len_tokens=seq_len_tokens, allow_hooks=True)
    shape = parse_model(ModelShape, {"model_id": model_id} | model_shape(model.config).model_dump())
    recorded = range(shape.layers) if layers is None else layers
    facts = {
        "model": shape.model_dump(), "recorded_layers": list(recorded), "audit_sha256": audited.model_sha256,
        "seq_len_tokens": seq_len_tokens, "block_size": block_size, "origin": "real", "seed": seed,
        "versions": library_versions("sparsering", "torch", "transformers", "pyarrow"),
    }  # fmt: skip
    return parse_model(TraceHeader, facts)


def capture_model(
    model: PreTrainedModel, token_ids: Tensor, writer: TraceWriter, settings: CaptureSettings, *,
    documents: Tensor | None = None, training_step: int | None = None, progress: Progress = no_progress,
) -> int:  # fmt: skip
    """Run the model on one sequence and append what it attends to as one training step; return that step.

    token_ids: [S] or [1, S], on any device; S is the trace's seq_len_tokens. documents: int32 [S], never falling, of
    packed ones: they do not see each other, and positions restart. training_step: the next one by default.
    The model runs without gradients in eval mode and is left as it was. Nothing is written when the run fails.
    Raises UnsupportedError with the reason when the model does not pass the audit (`audit.py`): no plan could run it.
    """
    header = writer.header
    ids = token_ids.reshape(1, -1)
    if ids.shape[1] != header.seq_len_tokens:
        raise InputError(f"has {ids.shape[1]} tokens, the trace {header.seq_len_tokens}", field="token_ids")
    check_angles(model)
    require_model(model, seq_len_tokens=header.seq_len_tokens, allow_hooks=True)
    if settings.sparse:  # heads that the kernels do not compute are refused before the first layer
        dtype, head_dim = str(model.dtype).removeprefix("torch."), header.model.head_dim
        computed_head_dim(sparse_backend(model.device), head_dim=head_dim, dtype=dtype, block_size=header.block_size)
    step_number = writer.next_step if training_step is None else training_step
    positions, documents = _restarted(header.seq_len_tokens, documents, model.device)
    with writer.step(step_number) as step, in_eval_mode(model), torch.no_grad():
        recorder = _Recorder(step, settings, progress, documents)
        attached = Attached(model, recorder, positions=positions, seq_len_tokens=header.seq_len_tokens)
        try:
            # The body without the head: logits of long sequences are large and nobody looks at them.
            model_body(model)(input_ids=ids.to(model.device), position_ids=positions[None], use_cache=False)
        finally:
            attached.detach()
    return step_number


def _restarted(tokens: int, documents: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return positions [S] that begin anew with each document, and the documents on the device."""
    positions = torch.arange(tokens, device=device)
    if documents is None:
        return positions, None
    if documents.shape != (tokens,) or bool((documents[1:] < documents[:-1]).any()):
        raise InputError(f"shape {tuple(documents.shape)} is not [{tokens}], or they fall", field="documents")
    documents = documents.to(device=device, dtype=torch.int32).contiguous()
    return positions - torch.searchsorted(documents, documents), documents


def sparse_backend(device: torch.device) -> str:
    """Return whose kernels compute sparse attention on this device."""
    return "triton" if device.type == "cuda" else "blockwise"


class _Recorder:
    """In the place of attention (`model.attached.Attention`): receives the layers of one forward pass in order."""

    def __init__(
        self, step: StepWriter, settings: CaptureSettings, progress: Progress, documents: Tensor | None
    ) -> None:
        self.step, self.settings, self.progress, self.documents = step, settings, progress, documents
        self.seen = 0
        self._next = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Record one layer and return its attention [1, S, H, D]."""
        if layer is None or q.shape[0] != 1:
            raise UnsupportedError(f"is {q.shape[0]}; one sequence at a time is captured", field="batch size")
        factor = float(q.shape[3] ** -0.5 if scale is None else scale)
        header = self.step.header
        if layer < self._next:
            raise UnsupportedError(f"{layer} attends twice in one pass; a trace has one pattern of it", field="layer")
        self._next = layer + 1
        wanted, limited = layer in header.recorded_layers, form.reach.limits(header.seq_len_tokens)
        if limited:  # the model's own pattern: there is nothing to choose
            mask = self._whole_reach(form, q)
            if wanted:
                self.step.append(layer, own_pattern(mask, form.reach), [own_choice(form.reach)] * mask.heads)
        elif wanted or self.settings.sparse:
            shard = ShardTensors.whole(
                q, k, block_size=header.block_size, softcap=form.softcap, documents=self.documents
            )
            mask = chosen_mask(self.settings.selector, shard, layer=layer, scale=factor)
            if wanted:
                self.step.append(layer, pattern_of(mask), self._choices(layer, shard, mask, factor))
        self.seen += 1
        self.progress("capturing layers", self.seen, header.model.layers)
        if not limited and not self.settings.sparse:
            if form.softcap is None and form.sinks is None and self.documents is None:
                return dense_causal(q, k, v, scale=factor)
            mask = self._whole_reach(form, q)
        assert mask is not None
        given = {"softcap": form.softcap, "sinks": form.sinks}
        return full_attention(q, k, v, mask, scale=factor, backend=sparse_backend(q.device), **given)[0]

    def close(self) -> None:
        """Nothing is held: the step is its writer's."""

    def _whole_reach(self, form: AttentionForm, q: Tensor) -> AttentionMask:
        """Return all that a layer of the model may attend in a sequence of q [1, S, H, D]."""
        return form.reach.mask(
            heads=q.shape[2], seq_len_tokens=q.shape[1], block_size=self.step.header.block_size, device=q.device,
            documents=self.documents,
        )  # fmt: skip

    def _choices(self, layer: int, shard: ShardTensors, mask: AttentionMask, scale: float) -> list[HeadChoice]:
        heads = [self.settings.selector.of_head(layer, head) for head in range(shard.heads)]
        kept = measure_kept(shard, mask, scale=scale, seed=self.settings.seed, rows=self.settings.sampled_rows)
        return [
            HeadChoice(selector=one.name, settings=one.settings, **its)
            for one, its in zip(heads, kept.by_head(), strict=True)
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


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Have a model and all its modules in eval mode, and leave each as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
