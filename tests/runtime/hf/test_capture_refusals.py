"""What capture refuses: attention that would be recorded wrongly, and settings that selectors cannot have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from capture_cases import BLOCK, SEQ_LEN, VERTICAL_SLASH, captured, token_ids
from sparsering.runtime.audit.twins import NotingAttention
from sparsering.runtime.hf.capture import (
    CaptureSettings,
    capture_model,
    dense_causal,
    trace_header,
)
from sparsering.runtime.model.attached import ATTENTION_NAME, Attached
from sparsering.runtime.model.calls.asked import attention_form, refuse_masks
from sparsering.runtime.pattern.form import PLAIN, WHOLE, AttentionForm, Reach
from sparsering.runtime.pattern.selectors import make_selector
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.errors import InputError, UnsupportedError
from tiny_models import tiny_model


class _Attention(torch.nn.Module):
    is_causal = True


REFUSED: dict[str, dict[str, Any]] = {
    "softcap: is 0.0, no number above 0": {"keywords": {"softcap": 0.0}},
    "softcap: is 'much'": {"keywords": {"softcap": "much"}},
    "s_aux: are not one learned logit a head": {"keywords": {"s_aux": torch.zeros(2)}},
    "s_aux: are not": {"keywords": {"s_aux": 1.0}},
    "sliding_window: is 9": {"keywords": {"sliding_window": 9}},
    "sliding_window: is 8": {"keywords": {"sliding_window": 8}, "reach": Reach(window_tokens=7)},
    "cu_seq_lens_q": {"keywords": {"cu_seq_lens_q": torch.tensor([0, 3, 10])}},
    "output_attentions": {"keywords": {"output_attentions": True}},
    "is_causal: is False": {"keywords": {"is_causal": False}},
    "surprise: is 'new'": {"keywords": {"surprise": "new"}},
    "dropout: is 0.1": {"dropout": 0.1},
    "explicit attention mask": {"attention_mask": torch.zeros(1, 1, 10, 10)},
    "a key/value cache": {"key": torch.zeros(1, 2, 12, 8)},
    "sliding_window: is 10": {"seq_len_tokens": 20},  # a window over this shard's tokens, not over the sequence's
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_attention_that_would_be_silently_wrong_is_refused(message: str) -> None:
    call: dict[str, Any] = {
        "key": torch.zeros(1, 2, 10, 8),
        "attention_mask": None,
        "dropout": 0.0,
        "keywords": {
            "sliding_window": 10,
            "softcap": None,
            "output_attentions": False,
            "position_ids": torch.arange(10),
        },
        "reach": WHOLE,
        "seq_len_tokens": 10,
    }
    query = torch.zeros(1, 4, 10, 8)
    attention_form(_Attention(), query, **call)
    with pytest.raises(UnsupportedError) as caught:
        attention_form(_Attention(), query, **{**call, **REFUSED[message]})
    assert message in str(caught.value)


def test_a_call_says_its_form() -> None:
    sinks, reach = torch.zeros(4), Reach(window_tokens=7)
    form = attention_form(
        _Attention(), torch.zeros(1, 4, 10, 8), torch.zeros(1, 2, 10, 8), None, dropout=0.0, reach=reach,
        keywords={"softcap": 30, "s_aux": sinks, "sliding_window": 7}, seq_len_tokens=10,
    )  # fmt: skip
    assert (form.softcap, form.reach) == (30.0, reach)
    assert form.sinks is sinks
    assert not form.reach.limits(7)
    assert form.reach.limits(8)


def test_masks_that_would_be_needed_are_refused() -> None:
    plain: dict[str, Any] = {"batch_size": 1, "q_length": 9, "kv_length": 9, "mask_function": causal_mask_function}
    assert refuse_masks(**plain, attention_mask=torch.ones(1, 9, dtype=torch.bool)) is None
    padded = torch.tensor([[True] * 8 + [False]])
    for change in ({"attention_mask": padded}, {"kv_length": 12}, {"q_offset": 3}):
        with pytest.raises(UnsupportedError):
            refuse_masks(**{**plain, **change})


class _Dense(NotingAttention):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        return dense_causal(q, k, v, scale=scale or q.shape[3] ** -0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [("padding", "attention_mask: "), ("packed", "position_ids: are not"), ("mask4d", "attention_mask: ")],
)
def test_an_attached_model_refuses_too(call: str, message: str) -> None:
    model, positions = tiny_model("qwen2"), torch.arange(SEQ_LEN)
    keywords: dict[str, Any] = {
        "padding": {"attention_mask": (positions > 3)[None].long()},
        "packed": {"position_ids": torch.cat([torch.arange(200), torch.arange(SEQ_LEN - 200)])[None]},
        "mask4d": {"attention_mask": torch.zeros(1, 1, SEQ_LEN, SEQ_LEN)},
    }
    attached = Attached(model, _Dense(), positions=positions, seq_len_tokens=SEQ_LEN)
    plain: dict[str, Any] = {"input_ids": token_ids()[None], "position_ids": positions[None], "use_cache": False}
    with torch.no_grad():
        model(**plain)
        with pytest.raises(InputError, match=message):
            model(**plain | keywords[call])
        attached.detach()
        model.set_attn_implementation(ATTENTION_NAME)
        with pytest.raises(UnsupportedError, match="has no plan"):
            model(**plain)


def _other_model(family: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family, vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("family", ["lfm2", "recurrent_gemma"])
def test_models_with_other_attention_are_refused_and_left_as_they_were(tmp_path: Path, family: str) -> None:
    model = _other_model(family, **({"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}))
    with pytest.raises(UnsupportedError):
        captured(tmp_path, model)
    assert model.config._attn_implementation == "eager"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_model_with_learned_positions_and_no_grouped_heads(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    trace = captured(tmp_path, AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert (trace.header.model.kv_heads, trace.header.model.head_dim) == (4, 16)


def test_a_batch_and_rounded_rotation_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    header = trace_header(model, model_id="tiny", seq_len_tokens=SEQ_LEN, block_size=BLOCK)
    settings = CaptureSettings(selector=VERTICAL_SLASH)
    with TraceWriter(tmp_path, header) as writer:
        with pytest.raises(InputError, match="has 1000 tokens"):
            capture_model(model, torch.stack([token_ids(), token_ids(1)]), writer, settings)
        with pytest.raises(UnsupportedError, match=r"rotary_emb.inv_freq: is torch.bfloat16"):
            capture_model(model.bfloat16(), token_ids(), writer, settings)


def test_settings_that_a_selector_cannot_have() -> None:
    for name, settings, message in (
        ("best", {}, "selector: 'best' is not one of anchor, block-mass, flex"),
        ("flex", {"columns": 3}, "columns: flex has no such setting"),
        ("flex", {"column_mass": 1.5}, "column_mass: must be above 0"),
        ("moba-block", {"top_chunks": 0}, "top_chunks: must be a whole number from 1"),
        ("vertical-slash", {"columns": 2.5}, "columns: must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            make_selector(name, settings)


def test_settings_that_do_not_fit_the_sequence_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="selector moba-block: chunk_tokens: 100 is no multiple"):
        captured(tmp_path, tiny_model("qwen2"), selector=make_selector("moba-block", {"chunk_tokens": 100}))
