"""Making a Hugging Face model use a plan: `attach` replaces its attention, `shard` cuts a batch for one rank.

Shape legend: B batch, S tokens of the whole sequence, S_own this rank's, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ..kernels.mask import AttentionMask
from ..planner.plan import ModelShape, Plan
from ..traces.errors import InputError, UnsupportedError
from ..traces.store import Trace
from .attention import Chooser, PlannedAttention
from .attention_call import check_attention_call, refuse_masks
from .mesh import Mesh
from .patterns import PlannedChoice, replayed_mask

# transformers gives names that contain "flash" or "sdpa" a meaning of its own; this one has none.
ATTENTION_NAME = "sparsering_planned"
IGNORED_LABEL = -100
LayerMask = Callable[[int], AttentionMask | Chooser]


class Attention(Protocol):
    """Attention over many ranks: `PlannedAttention`, or a baseline that ignores the mask."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float | None = None, layer: int | None = None
    ) -> Tensor:
        """Return out [B, S_own, H, D] of one of the model's layers."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Attached:
    """A model whose attention runs by a plan. Hand every rank's model its own shard of the batch (see `shard`)."""

    def __init__(self, model: PreTrainedModel, planned: Attention, masks: LayerMask) -> None:
        self.model, self.planned, self._masks = model, planned, masks
        self._before = model.config._attn_implementation or "eager"
        self._modules = _attention_modules(model)
        for module in self._modules:
            module._sparsering = self
        model.set_attn_implementation(ATTENTION_NAME)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Return the attention output [B, S_own, H, D] of one layer."""
        return self.planned(q, k, v, self._masks(layer), scale=scale, layer=layer)

    def detach(self) -> None:
        """Give the model its own attention back and free the channels."""
        self.model.set_attn_implementation(self._before)
        for module in self._modules:
            del module._sparsering
        self.planned.close()


def attach(
    model: PreTrainedModel, plan: Plan, mesh: Mesh, *, trace: Trace | None = None, training_step: int | None = None
) -> Attached:
    """Make `model` compute its attention over the ranks of `mesh` as `plan` says. Collective.

    trace: whose patterns of `training_step` (default: the last) are replayed, when the plan replays a trace.
    Raises InputError when world size, model shape or trace are not the plan's, before any GPU work.
    """
    plan.require(world_size=mesh.world_size, model=model_shape(model))
    if plan.pattern.source == "trace":
        masks = _replay(plan, mesh, trace, training_step)
        return Attached(model, PlannedAttention(plan, mesh), masks)
    planned = PlannedAttention(plan, mesh)
    choice = PlannedChoice(plan, mesh, planned.positions[mesh.rank])
    return Attached(model, planned, choice.of_layer)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Return the attention shape of a model's configuration."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def shard(batch: dict[str, Tensor], plan: Plan, rank: int, *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Cut a batch of whole sequences for one rank, once, in the data loader.

    batch: "input_ids" [B, S] with S the plan's seq_len_tokens, optionally "labels" [B, S] (default: the ids).
    Returns "input_ids", "position_ids", "labels" [B, S_own] in the rank's order. Labels are shifted over the whole
    sequence here: entry t is what token t must predict, so the loss must not shift again (the last token and padding
    have -100); "shift_labels" is the same tensor, under the name by which transformers' losses skip their own shift.
    Raises InputError for another length, and UnsupportedError for a padding mask: `shard` pads by itself.
    """
    if not 0 <= rank < plan.world_size:
        raise InputError(f"must be below {plan.world_size}, not {rank}", field="rank")
    unknown = set(batch) - {"input_ids", "labels", "attention_mask"}
    if unknown:
        raise UnsupportedError(f"{sorted(unknown)} cannot be sharded", field="batch")
    if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
        raise UnsupportedError("marks padding; give whole sequences, shard() pads", field="attention_mask")
    ids = batch["input_ids"]
    labels = batch.get("labels", ids)
    if ids.dim() != 2 or ids.shape[1] != plan.seq_len_tokens or labels.shape != ids.shape:
        raise InputError(f"shapes {tuple(ids.shape)}, {tuple(labels.shape)} are not [B, {plan.seq_len_tokens}]",
                         field="input_ids, labels")  # fmt: skip
    placement = plan.make_placement()
    missing = placement.padded_tokens - plan.seq_len_tokens
    positions = torch.from_numpy(placement.positions(rank)).to(ids.device)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, missing + 1), value=IGNORED_LABEL)
    own_labels = shifted[:, positions]
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, missing), value=pad_token_id)[:, positions],
        "position_ids": positions.expand(ids.shape[0], -1),
        "labels": own_labels,
        "shift_labels": own_labels,
    }


def _replay(plan: Plan, mesh: Mesh, trace: Trace | None, training_step: int | None) -> LayerMask:
    if trace is None:
        raise InputError("the plan replays a trace: give the trace", field="trace")
    if plan.pattern.trace_sha256 not in (None, trace.digest()):
        raise InputError(f"is {trace.digest()[:16]}, not the plan's {plan.pattern.trace_sha256}", field="trace")
    step = trace.steps[-1] if training_step is None else training_step
    missing = set(range(plan.model.layers)) - set(trace.layers)
    if missing or step not in trace.steps:
        raise InputError(f"lacks layers {sorted(missing)} or step {step}", field="trace")
    masks = [
        replayed_mask(plan, trace.layer_pattern(step, layer), layer=layer, device=mesh.device)
        for layer in range(plan.model.layers)
    ]
    return masks.__getitem__


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """Return the modules that call the attention interface: those that know their layer and are causal."""
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    if not modules:
        raise UnsupportedError(f"{type(model).__name__} has no attention of transformers' interface", field="model")
    return modules


def _planned_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function of transformers' interface: [B, H, S, D] in, [B, S, H, D] out."""
    attached = getattr(module, "_sparsering", None)
    if attached is None:
        raise UnsupportedError("has no plan: use sparsering.attach", field=type(module).__name__)
    check_attention_call(module, query, key, attention_mask, dropout=dropout, keywords=keywords)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attached.attend(module.layer_idx, q, k, v, scaling), None


def _refuse_padding(*args: Any, **keywords: Any) -> None:
    # Positions of a shard are not contiguous, which transformers takes for packed documents; that guess is dropped.
    keywords.pop("mask_function", None)
    refuse_masks(*args, **keywords)


AttentionInterface.register(ATTENTION_NAME, _planned_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _refuse_padding)
