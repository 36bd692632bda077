"""A small copy of a model: the same class and settings, every kind of layer, narrow, with weights that make all count.

The audit runs it alone and split in two, so it has to keep what decides how tokens meet (kinds of layers and their
order, numbers of heads and experts, scales, caps, kernels of convolutions) and may change what does not (widths,
vocabulary, repeated layers). Lengths (windows, chunks, positions) keep their proportion to the sequence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from ..model.head_sizes import added_dims
from ..model.shape import EXPERTS, EXPERTS_OF_A_TOKEN, decoder_layers, layer_reaches, model_shape

SMALLEST_HEAD_DIM = 8
SMALL_VOCABULARY = 256
MOST_INNER_WIDTH = 64
FEWEST_EXPERTS = 4
SPECIAL_TOKEN = re.compile(r"_token_id$")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEAD_DIMS = re.compile(r"(^|_)(head_dim|d_head|dim_head|kv_channels|attention_head_dim)$|_head_?dim$")
WIDTHS = re.compile(
    r"(hidden_size|intermediate|ffn|mlp_dim|d_model|d_inner|n_embd|n_inner|emb(ed)?_dim|embedding_size|proj_dim|dff|width"
    r"|lora_rank|_rank$|d_ssm|rotary_dim|hidden_dim|d_ff|dim_ff|dim_model|mid_dim|channels|d_rel$)"
)
INNER_WIDTHS = re.compile(r"(intermediate|ffn|dff|d_ff|dim_ff|n_inner|mlp_dim)")
EXPERT_GROUPS = ("n_group", "num_expert_group")
NO_WIDTHS = re.compile(r"(multipl|factor|ratio|scale|norm|dropout|vocab|laurel|init|std|cap$|multiple_of)")
# Numbers that stay as they are: counts, states, scales. What is in no list and large is taken for a number of tokens.
KEPT = re.compile(
    r"(heads|layers|experts|groups|types|scalar|seed|multiple|state|token|rank|buckets|parts|bins|blocks|codebook|quantizers)"
)
SMALLEST_LENGTH = 32
HEAD_STD = 3.0
PADDED_TOKENS = 128  # of the proof, AUDITED_TOKENS in whole stripes
MOST_OFFSET = 8  # of positions in a table of them
FIXED_BUFFERS = re.compile(r"(inv_freq|mask|bias$)")
LAYER_NUMBER = re.compile(r"(layer|block)_(idx|id|index|number)$|^(idx|training)$")
LENGTHS = re.compile(r"(sliding_window|window_size|attention_chunk_size|local_attention|window_len|rel_extent)$")
POSITIONS = re.compile(
    r"(n_positions|max_seq_len|n_ctx|max_position_embeddings|max_target_positions|model_max_length|max_length)$"
)


@dataclass(frozen=True, kw_only=True)
class Shrinking:
    """How much smaller: widths are divided by `width`; windows multiplied by `window`, and numbers of positions, which
    padding needs too, by `positions`; layers: how many are kept. within: what sequences have after that: a length that
    was below theirs stays so.

    few: also bounds the widths within a layer's MLP and the number of experts, which few models tie to anything else.
    """

    width: int
    window: float = 1.0
    within: int | None = None
    positions: float = 1.0
    layers: int | None = None
    few: bool = True


def narrowest(config: Any) -> Shrinking:
    """Return how narrow a configuration can be made: heads stay at least 8 wide, lengths as they are."""
    stated = {name: value for name, value in config.to_dict().items() if HEAD_DIMS.search(name)}
    shape = model_shape(config)
    own = shape.head_dim - added_dims(config)
    dims = [own, *(dim for dim in stated.values() if type(dim) is int and dim > 0)]
    width = 1
    while all(dim % (4 * width) == 0 and dim // (2 * width) >= SMALLEST_HEAD_DIM for dim in dims):
        width *= 2  # to an even number: rotation takes elements in pairs
    if width == 1 and not stated:  # heads share what there is, which need not be a power of two
        for narrower in range(2, own // SMALLEST_HEAD_DIM + 1):
            dim = -(-config.hidden_size // narrower) // shape.heads
            width = narrower if dim >= SMALLEST_HEAD_DIM and dim % 2 == 0 else width
    return Shrinking(width=width)


def shrunken_config(config: Any, shrinking: Shrinking) -> Any:
    """Return a small configuration of the same class. What its class cannot make raises what the class raises."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("dtype", "torch_dtype")}
    _shrink(settings, shrinking, before=model_shape(config).layers)
    return type(config).from_dict(settings)


def _shrink(settings: dict[str, Any], shrinking: Shrinking, *, before: int) -> None:
    keep = shrinking.layers
    for name, value in list(settings.items()):
        if name in ("id2label", "label2id"):
            continue
        if isinstance(value, dict) and name == "per_layer_config":
            settings[name] = {key: inner for key, inner in value.items() if keep is None or int(key) < keep}
            for inner in settings[name].values():
                _shrink(inner, shrinking, before=before)
        elif isinstance(value, dict) and name == "rope_parameters":
            settings[name] = _rope(value, shrinking)
        elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
            _shrink(value, shrinking, before=before)
        elif isinstance(value, list) and value and len(value) == before and all(type(item) is int for item in value):
            numbers = [_number(name, item, shrinking, before=before) for item in value]
            settings[name] = numbers if keep is None else numbers[:keep]
        elif isinstance(value, list) and keep is not None:
            settings[name] = _listed(name, value, keep=keep, before=before)
        elif type(value) is int and value > 0:
            settings[name] = _number(name, value, shrinking, before=before)
    if shrinking.few:
        _fewer_experts(settings)


def _number(name: str, value: int, shrinking: Shrinking, *, before: int) -> int:
    if SPECIAL_TOKEN.search(name):
        return min(value, SMALL_VOCABULARY - 1)
    if "vocab" in name or name == "n_words":
        return min(value, SMALL_VOCABULARY)
    if name in LAYER_COUNTS:
        is_count = value > 1 and before % value == 0  # less where a decoder layer attends more than once
        return shrinking.layers if shrinking.layers is not None and is_count else value
    if LENGTHS.search(name):
        return _length(value, shrinking)
    if POSITIONS.search(name):
        return _positions(value, shrinking)
    if shrinking.few and INNER_WIDTHS.search(name) and not NO_WIDTHS.search(name):
        return min(-(-value // shrinking.width), MOST_INNER_WIDTH)
    if HEAD_DIMS.search(name) or (WIDTHS.search(name) and not NO_WIDTHS.search(name)):
        return -(-value // shrinking.width)
    if value >= SMALLEST_LENGTH and not KEPT.search(name):
        return _length(value, shrinking)
    return value


def _length(value: int, shrinking: Shrinking) -> int:
    """A number of tokens in proportion, which limits a short sequence if it limited the long one."""
    scaled = max(1, math.ceil(value * shrinking.window))
    if shrinking.within is not None and value * shrinking.window < shrinking.within:
        return min(scaled, shrinking.within - 1)
    return scaled


def _positions(value: int, shrinking: Shrinking) -> int:
    """A number of positions in proportion; rows beyond the sequence stay, for tables whose first is not position 0."""
    scaled = max(1, math.ceil(value * shrinking.positions))
    beyond = math.ceil(value - PADDED_TOKENS / shrinking.positions) if shrinking.positions != 1.0 else 0
    return max(scaled, PADDED_TOKENS + min(beyond, MOST_OFFSET)) if beyond > 0 else scaled


def _fewer_experts(settings: dict[str, Any]) -> None:
    """Keep twice as many experts as a token visits, and two of every group that a router chooses among."""
    counts = {name: value for name, value in settings.items() if type(value) is int}
    visited = max((counts[name] for name in EXPERTS_OF_A_TOKEN if name in counts), default=1)
    groups = max((counts[name] for name in EXPERT_GROUPS if name in counts), default=1)
    enough = -(-max(2 * visited, 2 * groups, FEWEST_EXPERTS) // groups) * groups
    for name in counts.keys() & {*EXPERTS, "zero_expert_num"}:
        settings[name] = min(counts[name], enough)


def _rope(value: dict[str, Any], shrinking: Shrinking) -> dict[str, Any]:
    """Rotation settings, nested by kind of layer or not: original lengths shrink as the sequence does."""
    shrunk = dict(value)
    for name, inner in value.items():
        if isinstance(inner, dict):
            shrunk[name] = _rope(inner, shrinking)
        elif name in ("short_factor", "long_factor") and isinstance(inner, list):
            shrunk[name] = inner[: max(len(inner) // shrinking.width, 1)]
        elif name == "original_max_position_embeddings" and type(inner) is int:
            shrunk[name] = max(1, math.ceil(inner * shrinking.positions))
    return shrunk


def _listed(name: str, value: list[Any], *, keep: int, before: int) -> list[Any]:
    """Lists with an entry a layer are cut; lists of layer numbers lose the layers that are gone."""
    if len(value) == before:
        return value[:keep]
    if re.search(r"(layers|_idxs|_ids|_indices)$", name) and all(type(item) is int for item in value):
        return [item for item in value if item < keep]
    return value


def layers_to_keep(model: PreTrainedModel) -> int | None:
    """Return how many layers, from the first, hold one of every kind, at least two; None where they are in no list.

    Two layers are of one kind when their modules have the same classes, parameter shapes and plain settings, and the
    configuration lets them look equally far.
    """
    try:
        layers = decoder_layers(model)
    except UnsupportedError:
        return None
    reaches = layer_reaches(model.config)
    reaches = reaches[:: len(reaches) // len(layers)]
    kinds = [f"{reach} {_kind(layer)}" for reach, layer in zip(reaches, layers, strict=True)]
    return max([min(2, len(layers)), *(kinds.index(kind) + 1 for kind in kinds)])


def _kind(layer: Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str | None) and not LAYER_NUMBER.search(key)
        }
        shapes = [(key, tuple(parameter.shape)) for key, parameter in module.named_parameters(recurse=False)]
        parts.append(f"{name} {type(module).__qualname__} {plain} {shapes}")
    return "\n".join(parts)


def enliven(model: PreTrainedModel) -> None:
    """Give random weights of a size at which everything counts: attention that prefers, experts that differ, logits
    large enough for scales and caps to show. Always the same."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            drawn = noise(parameter)
            if parameter.dim() >= 2:
                parameter.copy_(drawn / math.sqrt(parameter.shape[-1]))
            elif parameter.dim() == 1:
                parameter.add_(0.1 * drawn)
        for name, buffer in model.named_buffers():  # a gate may be a buffer of zeros until weights are loaded
            if buffer.is_floating_point() and not FIXED_BUFFERS.search(name):
                buffer.add_(0.1 * noise(buffer))
        for embedding, is_head in ((model.get_input_embeddings(), False), (model.get_output_embeddings(), True)):
            weight: Tensor | None = getattr(embedding, "weight", None)
            if weight is not None and weight.dim() == 2:
                target = HEAD_STD / math.sqrt(weight.shape[-1]) if is_head else 1.0
                weight.mul_(target / weight.std().clamp(min=1e-12))
