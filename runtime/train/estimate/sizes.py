"""What a configuration and its model say of a step, as the planner's step model takes it."""

from __future__ import annotations

from typing import Any

from ....planner.plan import Plan
from ....planner.specs import ELEMENT_BYTES
from ....planner.step.work import StepSettings, TransformerSizes
from ....traces.errors import UnsupportedError
from ...model.shape import EXPERTS, positive_settings, text_config
from ..config import TrainConfig
from ..model import ModelFacts, master_dtype
from .memory import offloaded_bytes


def transformer_sizes(model_config: Any, facts: ModelFacts) -> TransformerSizes:
    """Return the sizes of a decoder. UnsupportedError for experts and for what has no plain hidden size."""
    text = text_config(model_config)
    if experts := positive_settings(text, EXPERTS):
        name, count = next(iter(experts.items()))
        raise UnsupportedError(f"is {count}: steps of experts have no prices", field=f"model.{name}")
    sizes = positive_settings(text, ("hidden_size", "vocab_size"))
    for name in ("hidden_size", "vocab_size"):
        if name not in sizes:
            raise UnsupportedError("is not said by the model's configuration", field=f"model.{name}")
    mlp = positive_settings(text, ("intermediate_size", "ffn_dim", "n_inner"))
    return TransformerSizes(
        attention=facts.shape,
        hidden=sizes["hidden_size"],
        mlp_hidden=next(iter(mlp.values()), 4 * sizes["hidden_size"]),
        vocabulary=sizes["vocab_size"],
        parameters=facts.parameters,
        layer_parameters=facts.layer_parameters,
    )


def step_settings(config: TrainConfig, model_config: Any, facts: ModelFacts, plan: Plan) -> StepSettings:
    """Return how the configuration computes a step under a plan."""
    memory, layers = config.memory, facts.shape.layers
    return StepSettings(
        tokens=plan.make_placement().tokens_per_rank,
        microbatches=config.microbatches,
        ranks=config.parallel.world_size,
        whole_layers=min(memory.whole_layers, layers) if memory.checkpoint_layers else layers,
        fused_layers=memory.fused_layers,
        fused_loss=memory.loss != "chunked",
        element_bytes=ELEMENT_BYTES[config.dtype],
        master_bytes=master_dtype(config).itemsize,
        mlp_tiles=memory.mlp_tiles,
        unit_layers=facts.unit_parameters // facts.layer_parameters,
        offloaded_bytes=offloaded_bytes(config, model_config, facts, plan),
    )
