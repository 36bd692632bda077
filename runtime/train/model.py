"""The model of a training run: counted, checked, built, its layers checkpointed, its parameters sharded over all ranks.

Parameters and optimizer states are float32 (float64 for float64 runs) and sharded; computation is in the run's type.

Whether it may be trained at all is the audit's to say (`runtime/audit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...planner.plan import ModelShape
from ...traces.errors import InputError
from ..attention.recompute import checkpoint_layer
from ..model.config_file import read_config_file, told
from ..model.head_loss import ModelWithLoss
from ..model.layers.fused import fuse_layers
from ..model.layers.tiled_mlp import tile_mlp
from ..model.layers.units import layers_of_a_unit, units
from ..model.load import pretrained
from ..model.losses import pick_implementation
from ..model.rope import replace_rope
from ..model.shape import active_parameters, check_angles, decoder_layers, model_shape
from .config import ModelSection, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model from its configuration alone.

    parameters: counted without memory; matrix_parameters: those that a token meets in matrix products, of experts the
    ones it visits (None where the model does not say how many); layer_parameters: of one decoder layer.
    """

    shape: ModelShape
    parameters: int
    matrix_parameters: int | None
    layer_parameters: int

    @property
    def unit_parameters(self) -> int:
        """Parameters of the layers that are gathered together."""
        return self.layer_parameters * layers_of_a_unit(self.shape.layers, self.layer_parameters)


def read_model_config(section: ModelSection) -> Any:
    """Return the transformers configuration of a local model, rope_parameters replaced; InputError in one line."""
    source = section.path / "config.json" if section.path.is_dir() else section.path
    if not source.is_file():
        raise InputError("no such model configuration", source=source, field="model.path")
    config = read_config_file(source)
    if section.rope_parameters is not None:
        replace_rope(config, section.rope_parameters, source=source)
    if not section.random_weights and not list(source.parent.glob("*.safetensors")):
        raise InputError("holds no safetensors weights (or set random_weights)", source=source.parent,
                         field="model.path")  # fmt: skip
    return config


def model_facts(config: Any) -> ModelFacts:
    """Return what the configuration says of the model; parameters are counted on the meta device."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # whatever its class says about the values, one line says it
            raise InputError(f"makes no causal language model ({told(error)})", field="model.path") from error
    active = active_parameters(model)
    lookups = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return ModelFacts(
        shape=model_shape(config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrix_parameters=None if active is None else active - lookups,
        layer_parameters=sum(parameter.numel() for parameter in decoder_layers(model)[0].parameters()),
    )


def build_model(section: ModelSection, config: Any, *, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """Return the model with all its parameters in `dtype`: random ones made on the device, files read on the host."""
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # grouped products of experts know no float64
    if section.random_weights:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    else:
        model = pretrained(section.folder, config, dtype=dtype)
    check_angles(model)
    return model.train()


def shard_model(model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh) -> ModelWithLoss:
    """Checkpoint and shard a model over all processes of `mesh`, in units of layers, and return it with its loss."""
    layers = decoder_layers(model)
    if config.memory.fused_layers:  # norms, rotation and MLP; attention and loss stay ours
        fuse_layers(model)
    if config.memory.mlp_tiles > 1:
        for layer in layers:
            tile_mlp(layer, config.memory.mlp_tiles)
    if config.memory.checkpoint_layers:
        for layer in layers[: max(len(layers) - config.memory.whole_layers, 0)]:
            checkpoint_layer(layer, offload=config.memory.offload)
    low = getattr(torch, config.dtype) if config.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    implementation = pick_implementation(config.memory.loss, torch.device(mesh.device_type))
    whole = ModelWithLoss(model, implementation, chunk_tokens=config.memory.loss_chunk_tokens)
    for unit in units(layers):
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, mp_policy=policy)
    fully_shard(whole, mesh=mesh, mp_policy=policy)
    return whole


def master_dtype(config: TrainConfig) -> torch.dtype:
    """The type of parameters and optimizer states."""
    return torch.float64 if config.dtype == "float64" else torch.float32
