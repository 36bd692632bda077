"""Heads of several sizes in one model: those that one plan computes, and how a layer's own heads become them.

A plan has one number of K/V heads and one head dim for all layers, keys and values. A model may have more: values that
are narrower than keys (multi-head latent attention), layers with other heads than the rest. Heads that are too narrow
get zeros behind them, which add nothing to scores and come out as zeros; K/V heads that are too few are repeated, which
sums their gradients. Both are exact, and cost what the wider heads cost.

Shape legend: B batch, S tokens, H query heads, H_kv K/V heads of the plan, D its head dim, h_kv and d a layer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...planner.plan import ModelShape
from ...traces.errors import UnsupportedError, shown

# Multi-head latent attention: keys are one part with and one part without rotation, for every query head.
LATENT, LATENT_KEY_PARTS = "kv_lora_rank", ("qk_nope_head_dim", "qk_rope_head_dim")
VALUE_DIM = "v_head_dim"
# What classes of these kinds multiply the stated K/V heads by, in some layers or all: a number, or a setting's name.
TIMES_KV_HEADS: dict[str, int | str] = {"mimo_v2_flash": 2, "jetmoe": "num_experts_per_tok"}
# Classes that add something to all scores of a key (ALiBi, Doge's mask), and the setting that says so; (): always.
ADDING: dict[str, tuple[str, ...]] = {"bloom": (), "doge": (), "mpt": ("attn_config", "alibi"), "falcon": ("alibi",)}
ADDED_DIMS = 4
DIGIT = 256  # a position is two digits to this base
# Up to here every whole number is one of the type.
WHOLE_NUMBERS = {torch.bfloat16: 1 << 8, torch.float16: 1 << 11}


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """What one plan computes for all layers: the number of K/V heads, and the head dim of keys and values."""

    kv_heads: int
    head_dim: int


def head_sizes(config: Any, *, heads: int, layers: int) -> HeadSizes:
    """Return the sizes that hold every layer's heads, as a language model's configuration states them.

    heads, layers: the configuration's. UnsupportedError where they are no numbers, or do not fit into one.
    """
    latent = _stated(config, LATENT, layers=layers)
    if latent:
        kv_heads, dims = {heads}, _widths(config, LATENT_KEY_PARTS, layers=layers)
    else:
        kv_heads = _stated(config, "num_key_value_heads", layers=layers) or {heads}
        dims = _stated(config, "head_dim", layers=layers) or _from_width(config, heads)
        times = TIMES_KV_HEADS.get(getattr(config, "model_type", ""), 1)
        factor = getattr(config, times) if isinstance(times, str) else times
        kv_heads = kv_heads | {factor * count for count in kv_heads}
    dims = dims | _stated(config, VALUE_DIM, layers=layers)
    most = max(kv_heads, default=0)
    if min(dims, default=0) < 1 or min(kv_heads, default=0) < 1 or heads % most or any(most % n for n in kv_heads):
        stated = f"{_listed(kv_heads)} and {_listed(dims)}"
        raise UnsupportedError(f"are {stated} for {heads} heads, which one plan cannot compute",
                               field="num_key_value_heads, head_dim")  # fmt: skip
    return HeadSizes(kv_heads=most, head_dim=max(dims) + added_dims(config))


def most_heads(config: Any, *, layers: int) -> int | None:
    """Return the most query heads of any layer, None where the configuration states none."""
    return max(_stated(config, "num_attention_heads", layers=layers), default=None)


def added_dims(config: Any) -> int:
    """Return how many elements a head has beyond the model's own, for what is added to the scores of a key."""
    kind = getattr(config, "model_type", "")
    if kind not in ADDING:
        return 0
    value: Any = config
    for name in ADDING[kind]:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return ADDED_DIMS if value else 0


def falling(
    q: Tensor, k: Tensor, *, slopes: Tensor, scale: float, positions: Tensor, seq_len_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return q and k [B, H, S, D + 4] whose scores have slope * position of the key added, of each head's slope.

    That is what ALiBi adds but for a constant a row, which a softmax does not see. slopes: [H], or the same for every
    sequence of the batch; positions int64 [B, S]. Positions are two digits and slopes two parts, so that 16-bit types
    hold them: slopes to 16 bits, positions exactly. UnsupportedError for sequences in which these would not be.
    """
    most = DIGIT * WHOLE_NUMBERS.get(q.dtype, seq_len_tokens)
    if seq_len_tokens > most:
        told = f"of {seq_len_tokens} tokens would be rounded in {q.dtype}, which has them up to {most}"
        raise UnsupportedError(told, field="positions that are added to scores")
    batch, heads, tokens, _ = q.shape
    exact = (slopes.reshape(-1, heads)[:1].double() / scale).expand(batch, heads)
    coarse = exact.to(q.dtype)
    fine = (exact - coarse.double()).to(q.dtype)
    of_q = torch.stack([DIGIT * coarse, coarse, DIGIT * fine, fine], dim=-1)
    digits = torch.stack([positions // DIGIT, positions % DIGIT] * 2, dim=-1).to(k.dtype).expand(batch, tokens, 4)
    of_k = digits[:, None].expand(batch, k.shape[1], tokens, 4)
    return torch.cat([q, of_q[:, :, None].expand(batch, heads, tokens, 4)], dim=-1), torch.cat([k, of_k], dim=-1)


def biased(q: Tensor, k: Tensor, *, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return q and k [B, H, S, D + 2] whose scores have bias [B, H, S] of the key added, which gets its gradient."""
    inverse = torch.tensor(1.0 / scale, dtype=torch.float64)
    coarse = inverse.to(q.dtype)
    parts = torch.stack([coarse, (inverse - coarse.double()).to(q.dtype)]).to(q.device)
    of_k = bias.to(k.dtype)[..., None].expand(*k.shape[:3], 2)
    return torch.cat([q, parts.expand(*q.shape[:3], 2)], dim=-1), torch.cat([k, of_k], dim=-1)


def fitted(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, S, H, D], k and v [B, S, H_kv, D] of a layer's own [B, S, H, d], [B, S, h_kv, d] and [.., d_v].

    The scale of scores is that of the own head dim, and of what attention returns the first d_v elements are the
    layer's. UnsupportedError, naming the size, for heads that are no part of the plan's.
    """
    heads, kv_heads, dim = q.shape[2], k.shape[2], max(q.shape[3], v.shape[3])
    if v.shape[2] != kv_heads or q.shape[3] != k.shape[3]:
        told = f"are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}: no heads of one attention"
        raise UnsupportedError(told, field="q, k, v")
    if heads < shape.heads and heads * shape.kv_heads == kv_heads * shape.heads:  # whole groups of heads are missing
        q, k, v = (pad(x, (0, 0, 0, most - x.shape[2])) for x, most in ((q, shape.heads), (k, shape.kv_heads),
                                                                        (v, shape.kv_heads)))  # fmt: skip
        heads, kv_heads = shape.heads, shape.kv_heads
    for name, own, planned in (("heads", heads, shape.heads), ("kv_heads", kv_heads, shape.kv_heads),
                               ("head_dim", dim, shape.head_dim)):  # fmt: skip
        fits = own == planned if name == "heads" else planned % own == 0 if name == "kv_heads" else own <= planned
        if not fits:
            raise UnsupportedError(f"is {own} in a layer of a model whose configuration says {planned}", field=name)
    times = shape.kv_heads // kv_heads
    if times > 1:
        k, v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
    return _widened(q, shape.head_dim), _widened(k, shape.head_dim), _widened(v, shape.head_dim)


def _widened(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[3] == dim else pad(x, (0, dim - x.shape[3]))


def _by_layer(config: Any, name: str, *, layers: int) -> list[Any]:
    """Return a setting's values, of each layer in turn where it differs from one to the next."""
    try:
        return [getattr(config, name, None)] * layers
    except RuntimeError:  # transformers: "a per-layer attribute and may vary across layers"
        return [getattr(config.per_layer_config[layer], name, None) for layer in range(layers)]


def _stated(config: Any, name: str, *, layers: int) -> set[int]:
    """Return the values of a setting, over layers where it differs from one to the next; empty where there is none."""
    found = {value for value in _by_layer(config, name, layers=layers) if value is not None}
    if any(type(value) is not int for value in found):
        raise UnsupportedError(f"is {shown(sorted(map(repr, found)))}, no number", field=name)
    return found


def _widths(config: Any, parts: tuple[str, ...], *, layers: int) -> set[int]:
    """Return the sums of settings, of all layers."""
    values = [_stated(config, name, layers=layers) for name in parts]
    if not all(values):
        told = " and ".join(_listed(value) or "missing" for value in values)
        raise UnsupportedError(f"are {told}", field=", ".join(parts))
    return {sum(own) for own in zip(*(_by_layer(config, name, layers=layers) for name in parts), strict=True)}


def _from_width(config: Any, heads: int) -> set[int]:
    """Return the head dim of a configuration that states none."""
    return {config.hidden_size // heads}


def _listed(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))
