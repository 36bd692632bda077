"""A model object is held to what was audited: what came into it later is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from faulty_models import SEQ_LEN_TOKENS, SMALL, Memory, shifted
from sparsering.runtime.audit.audit import require_model
from sparsering.traces.errors import UnsupportedError


class OwnMLP(LlamaMLP):
    """A class that is one of the model's own, and something else."""


def _with_memory(model: Any) -> None:
    model.model.layers[1].mlp = Memory(model.model.layers[1].mlp)


def _with_own_mlp(model: Any) -> None:
    model.model.layers[1].mlp = OwnMLP(model.config)


def _with_own_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: shifted(plain(x))


def _with_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: shifted(out))


def _with_own_loss(model: Any) -> None:
    model.loss_function = lambda logits, **more: 2 * logits.mean()


def _with_dropout(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.1)


def _with_another_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 1.0


def _with_another_activation_setting(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_memory, r"model.layers.1.mlp: is a \S*Memory, which LlamaForCausalLM does not have"),
        (_with_own_mlp, r"model.layers.1.mlp: is a \S*OwnMLP, which LlamaForCausalLM does not have"),
        (_with_own_forward, r"model.layers.1.mlp: has a method or hook of \S*_with_own_forward"),
        (_with_hook, r"model.layers.1.mlp: has a method or hook of \S*_with_hook"),
        (_with_own_loss, r"LlamaForCausalLM: has a method or hook of \S*_with_own_loss"),
        (_with_dropout, r"model.layers.0.mlp.act_fn: drops 0.1"),
        (_with_another_scale, r"model.layers.1.self_attn.scaling: is 1.0, the model's configuration makes it 0.25"),
        (_with_another_activation_setting, r"model.rotary_emb.rope_type: is 'default', .* makes it 'linear'"),
    ],
)
def test_what_came_into_a_model_later_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    require_model(model, seq_len_tokens=SEQ_LEN_TOKENS)
    change(model)
    with pytest.raises(UnsupportedError, match=message):
        require_model(model, seq_len_tokens=SEQ_LEN_TOKENS)


def test_adapters_of_lora_are_let_through() -> None:
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    assert require_model(adapted.get_base_model(), seq_len_tokens=SEQ_LEN_TOKENS).right
