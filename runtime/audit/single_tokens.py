"""A quick look at every layer, at true lengths: without attention, a model that may be split is a map of single tokens.

Attention is replaced by a function of each token's own query, key and value. What a token becomes must then not depend
on which others are there: the tokens of a shard must come out as they do among all tokens. Unlike the proof
(`proof.py`) this takes the model's own lengths, positions up to the end of the sequence, and can take all layers.

Shape legend: B batch, S tokens that are looked at, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from ..model.attached import Attached
from ..model.calls.placing import uncounted_token
from ..model.shape import model_body, model_shape, setting
from ..pattern.form import PLAIN, AttentionForm
from .twins import AttentionCall, Double, NotingAttention

TOLERANCE = 1e-6
MOST_TOKENS = 65_536
MOST_PRODUCTS = 1e10  # parameters times tokens: some seconds on two cores
FEWEST_TOKENS = 512
FIRST_TOKENS = 8
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
STRIPE = 7


class TokenLocal(NotingAttention):
    """In the place of attention: lets no token see another."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return [B, S, H, D] in which q, k, v and their angles all count."""
        keys, values = self.note(q, k, v, layer, form)
        return (torch.tanh((q * keys).mean(-1, keepdim=True)) * values + 0.1 * q).contiguous()


def check_single_tokens(model: PreTrainedModel, *, seq_len_tokens: int) -> None:
    """Raise UnsupportedError unless tokens of a shard come out as among all, and every layer asks for attention.

    model: narrow, float64, of true lengths. In eval mode, which the proof does not look at. Tokens are as many as time
    allows, spread over the sequence, special ones among them.
    """
    model.eval()
    affordable = min(MOST_TOKENS, int(MOST_PRODUCTS / model.num_parameters()))
    tokens = min(seq_len_tokens, max(FEWEST_TOKENS, affordable))
    positions = torch.linspace(0, seq_len_tokens - 1, tokens, dtype=torch.float64).long()[None]
    ids = random_ids(model, tokens, torch.Generator().manual_seed(0))
    own = (torch.arange(tokens) // STRIPE) % 2 == 1
    local = TokenLocal()
    _hidden(model, local, ids[:, :FIRST_TOKENS], positions[:, :FIRST_TOKENS], seq_len_tokens)
    check_calls(local.calls, model)  # turns away what scans along the sequence, which is slow, before it must
    among_all = _hidden(model, TokenLocal(), ids, positions, seq_len_tokens)
    alone = _hidden(model, TokenLocal(), ids[:, own], positions[:, own], seq_len_tokens)
    error = float((alone - among_all[:, own]).abs().max() / among_all.abs().max())
    if not error <= TOLERANCE:
        told = f"without attention, what a token becomes depends on others (by {error:.2g})"
        raise UnsupportedError(f"{told}: split over ranks it is another model", field="audit")


def random_ids(model: PreTrainedModel, tokens: int, generator: torch.Generator) -> Tensor:
    """Return random token ids [1, tokens] in which the special ones occur too, but for one that is not counted."""
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=generator)
    special = [value for name in SPECIAL_TOKENS if type(value := setting(config, name)) is int]
    for number, value in enumerate(special):
        if 0 <= value < config.vocab_size:
            ids[:, 5 + number :: 29] = value
    uncounted, _ = uncounted_token(model_body(model))
    return ids if uncounted is None else ids.masked_fill(ids == uncounted, (uncounted + 1) % config.vocab_size)


def check_calls(calls: list[AttentionCall], model: PreTrainedModel) -> None:
    """Raise UnsupportedError unless every layer asked once, in order, with the heads that the configuration states."""
    shape = model_shape(model.config)
    if not calls:
        told = f"{type(model).__name__} never asks transformers' attention interface"
        raise UnsupportedError(told, field="attention")
    layers = [layer for layer, _ in calls]
    if list(dict.fromkeys(layers)) != list(range(shape.layers)):
        shown = ", ".join(map(str, layers[:8])) + (", …" if len(layers) > 8 else "")
        told = f"is asked for by layers [{shown}] of {shape.layers}; each must ask, in order"
        raise UnsupportedError(f"{told}: whatever else mixes tokens does so within a shard", field="attention")
    for layer, found in calls:
        for what, value in found.items():
            stated = getattr(shape, what)
            if value != stated:
                told = f"is {value} in layer {layer} of a small copy whose configuration says {stated}"
                raise UnsupportedError(told, field=what)


def _hidden(model: PreTrainedModel, local: TokenLocal, ids: Tensor, positions: Tensor, seq_len_tokens: int) -> Tensor:
    attached = Attached(model, local, positions=positions[0], seq_len_tokens=seq_len_tokens)
    try:
        with torch.no_grad(), Double():
            return model_body(model)(input_ids=ids, position_ids=positions, use_cache=False)[0]
    finally:
        attached.detach()
