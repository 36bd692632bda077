"""Bytes of one rank at the peak of a training step, by purpose: what stays, what is kept for backward, what works."""

from __future__ import annotations

from typing import Any

from ....planner.cost.memory import layer_memory
from ....planner.plan import Plan
from ....planner.schedule.schedule import DIRECTIONS
from ....planner.specs import ELEMENT_BYTES
from ....planner.step.work import GATED_MLP_MATRICES
from ..config import TrainConfig
from ..model import ModelFacts, master_dtype

LIGER_ROWS = 2  # pieces of logits that liger-kernel's loss holds: the chunk's, and their float32 copies' share


def memory_bytes(config: TrainConfig, model_config: Any, facts: ModelFacts, plan: Plan) -> dict[str, int]:
    """Return bytes by purpose on one rank at the peak of a step, and their "total". Allocators differ.

    The peak is where backward begins: all that forward kept is there, and the gradients, which grow as that shrinks,
    count only where they outgrow it. `working` is what works then: the loss, or attention's backward; or later, when
    whole layers are gone, the first layer that is computed again, as far as it exceeds what they held.
    """
    memory, layers, ranks = config.memory, facts.shape.layers, config.parallel.world_size
    whole = min(memory.whole_layers, layers) if memory.checkpoint_layers else layers
    own, element = _Layer(config, model_config, plan), ELEMENT_BYTES[config.dtype]
    masters = master_dtype(config).itemsize * facts.parameters // ranks
    outside = facts.parameters - layers * facts.layer_parameters
    gathered = element * 2 * (outside + facts.unit_parameters)
    kept = 0 if memory.offload else (layers - whole) * own.kept
    again = max(own.all, own.attention) - whole * own.all if whole < layers else 0
    parts = {
        "parameters": masters,
        "optimizer": 2 * masters,
        "gathered_parameters": gathered + master_dtype(config).itemsize * facts.unit_parameters,
        "kept_for_backward": kept,
        "whole_layers": whole * own.all,
        "kept_patterns": 0 if config.plan.choose.always else layers * _listed_bytes(plan),
        "gradients_beyond_kept": max(0, masters - kept - whole * own.all),
        "working": max(own.loss, again, own.attention - own.beside_mlp if whole else 0),
    }
    return parts | {"total": sum(parts.values())}


def _listed_bytes(plan: Plan) -> int:
    """Return what the mask of a layer takes that lists its blocks, one to a byte; of diagonals, next to nothing."""
    blocks = -(-plan.seq_len_tokens // plan.block_size)
    return plan.model.heads * blocks * blocks if plan.pattern.listed else 0


def offloaded_bytes(config: TrainConfig, model_config: Any, facts: ModelFacts, plan: Plan) -> int:
    """Return the bytes that a microbatch brings to host memory, and back in backward; 0 without offload."""
    if not config.memory.offload:
        return 0
    recomputed = facts.shape.layers - min(config.memory.whole_layers, facts.shape.layers)
    return recomputed * _Layer(config, model_config, plan).kept


class _Layer:
    """Bytes of one layer: all of it, what stays where it is computed again, its attention at work; and the loss's."""

    def __init__(self, config: TrainConfig, model: Any, plan: Plan) -> None:
        shape, element, memory = plan.attention_shape(), ELEMENT_BYTES[config.dtype], config.memory
        tokens, wide = shape.tokens_per_rank, max(4, element)
        row = tokens * model.hidden_size * element
        queries = tokens * shape.heads * shape.head_dim * element
        keys = 2 * tokens * shape.kv_heads * shape.head_dim * element
        mlp_hidden = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
        of_mlp = -(-tokens * mlp_hidden * element // memory.mlp_tiles)
        # In pieces, gradients of its weights are summed over them.
        summed = GATED_MLP_MATRICES * wide * model.hidden_size * mlp_hidden if memory.mlp_tiles > 1 else 0
        kept_kv = plan.schedule("forward").kept_bytes
        columns = 2 * plan.columns_capacity * shape.heads * shape.head_dim * element
        self.beside_mlp = 6 * row + 2 * queries + keys + kept_kv
        self.kept = row + queries + tokens * shape.heads * shape.accumulator_bytes + kept_kv + columns
        # Fused norms keep one number a token and a fused activation nothing; plain ones their float32 copies.
        self.all = (
            self.beside_mlp
            + (3 if memory.fused_layers else 5) * of_mlp
            + (0 if memory.fused_layers else 6 * row)
            + summed
        )
        backend, reordered = plan.kernels.backend, plan.head_orders is not None
        listed = plan.block_size if plan.pattern.listed else None
        given: dict[str, Any] = {"backend": backend, "reordered": reordered, "listed_block_tokens": listed}
        own = [layer_memory(plan.schedule(d), shape, **given) for d in DIRECTIONS]
        self.attention = self.beside_mlp + max(one.total_bytes for one in own)
        chunk = min(memory.loss_chunk_tokens, tokens)
        if memory.loss != "chunked":  # liger-kernel's: as many pieces as the vocabulary is wider than hidden states
            chunk = -(-tokens * model.hidden_size // model.vocab_size)
        logits = chunk * model.vocab_size * (LIGER_ROWS * element + wide)
        self.loss = logits + wide * model.vocab_size * model.hidden_size + 2 * row
