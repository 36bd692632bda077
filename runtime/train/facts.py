"""What is known of a model from its configuration alone, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ...planner.plan import ModelShape
from ...traces.errors import InputError
from ..model.shape import active_parameters, decoder_layers, model_shape


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model from its configuration alone.

    parameters: counted without memory; active_parameters: those that a token meets, of experts the ones it visits (None
    where the model does not say how many); embedding_parameters: those of the input embedding, which take part in no
    matrix product of their own.
    """

    model_type: str
    shape: ModelShape
    hidden: int
    intermediate: int
    vocabulary: int
    tied: bool
    parameters: int
    active_parameters: int | None
    embedding_parameters: int
    layer_parameters: int


def model_facts(config: Any) -> ModelFacts:
    """Return what the configuration says of the model; parameters are counted on the meta device."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # whatever its class says about the values, one line says it
            told = f"makes no causal language model ({type(error).__name__}: {error})"
            raise InputError(told, field="model.path") from error
    embedding = model.get_input_embeddings().weight.numel()
    layers = decoder_layers(model)
    return ModelFacts(
        model_type=config.model_type,
        shape=model_shape(config),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        active_parameters=active_parameters(model),
        embedding_parameters=embedding,
        layer_parameters=sum(parameter.numel() for parameter in layers[0].parameters()),
    )
