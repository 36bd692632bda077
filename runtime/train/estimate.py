"""How much memory a training run needs on a rank, from shapes alone: what `--dry-run` shows.

Shape legend: S_own tokens of a shard, E hidden size, H query heads, D head dim, V vocabulary, W ranks.
"""

from __future__ import annotations

from ...planner.cost.memory import layer_memory
from ...planner.plan import ELEMENT_BYTES, Plan
from ...planner.schedule.schedule import DIRECTIONS
from .config import TrainConfig
from .model import ModelFacts

MASTER_BYTES = 4


def memory_estimate(config: TrainConfig, facts: ModelFacts, plan: Plan) -> dict[str, int]:
    """Return bytes by purpose on one rank at the peak of a step, and their "total". An estimate: allocators differ."""
    shape, world = plan.attention_shape(), config.parallel.world_size
    element, tokens = ELEMENT_BYTES[config.dtype], shape.tokens_per_rank
    master = 8 if config.dtype == "float64" else MASTER_BYTES
    root = facts.parameters - facts.shape.layers * facts.layer_parameters
    row = tokens * facts.hidden * element
    queries = tokens * shape.heads * shape.head_dim * element
    keys = 2 * tokens * shape.kv_heads * shape.head_dim * element
    kept = row + queries + tokens * shape.heads * shape.accumulator_bytes
    kept += 2 * plan.columns_capacity * shape.heads * shape.head_dim * element
    kept_kv = plan.schedule("forward").kept_bytes
    kept += kept_kv
    layer = kept_kv + 6 * row + 2 * queries + keys + 4 * tokens * facts.intermediate * element
    layers = facts.shape.layers
    whole = min(config.memory.whole_layers, layers) if config.memory.checkpoint_layers else layers
    backend = plan.kernels.backend
    reordered = plan.head_orders is not None
    memories = [layer_memory(plan.schedule(d), shape, backend=backend, reordered=reordered) for d in DIRECTIONS]
    attention = max(memory.total_bytes for memory in memories)
    chunk = min(config.memory.loss_chunk_tokens, tokens) * facts.vocabulary * (2 * master + 2 * element)
    parts = {
        "parameters": master * facts.parameters // world,
        "gradients": master * facts.parameters // world,
        "optimizer": 2 * master * facts.parameters // world,
        "gathered_parameters": element * (2 * facts.layer_parameters + 2 * root) + master * facts.layer_parameters,
        "kept_for_backward": 0 if config.memory.offload else (layers - whole) * kept,
        "whole_layers": max(whole, 1) * layer,
        "attention": attention,
        "loss": chunk + master * facts.vocabulary * facts.hidden + row,
    }
    return parts | {"total": sum(parts.values())}
