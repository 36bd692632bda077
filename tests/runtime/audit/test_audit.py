"""The audit: right families are right, others are refused with the reason; audits are kept by what they rest on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from faulty_models import SEQ_LEN_TOKENS, SMALL, OwnLlama, audited, shifted
from model_cases import CASES, case_config
from sparsering.runtime.audit.audit import audit
from sparsering.runtime.audit.proof import TOLERANCE
from sparsering.runtime.audit.result import Audit


@pytest.mark.parametrize("name", list(CASES))
def test_a_family_is_right_or_refused_with_the_reason(name: str) -> None:
    refusal = CASES[name][2]
    found = audit(case_config(name), seq_len_tokens=SEQ_LEN_TOKENS, cache=None)
    assert found.right == (refusal is None), found.reason
    if refusal is None:
        assert all(error < TOLERANCE for road in found.errors.values() for error in road.values())
    else:
        assert re.search(refusal, f"{found.about}: {found.reason}")
        assert "\n" not in f"{found.reason}"


def test_windows_and_lengths_count_against_the_sequence() -> None:
    config = case_config("mistral-window")
    assert audit(config, seq_len_tokens=64, cache=None).right
    chunks = case_config("llama4-chunks")
    assert audit(chunks, seq_len_tokens=64, cache=None).right
    learned = case_config("gpt2")
    too_long = audit(learned, seq_len_tokens=8192, cache=None)
    assert not too_long.right and "does not run" in f"{too_long.reason}"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        # Llama does none of this, whatever its configuration says.
        ({"sliding_window": 70, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}, "off by"),
        ({"sliding_window": 70, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "off by"),
        ({"attention_chunk_size": 72, "layer_types": ["full_attention"] * 2 + ["chunked_attention"] * 2}, "off by"),
        ({"sliding_window": 255}, "off by"),
        ({"sliding_window": 254}, "off by"),
        ({"attention_chunk_size": 255}, "off by"),
        ({"attn_logit_softcapping": 0.5}, "softcap"),
    ],
)
def test_what_a_configuration_says_and_its_model_does_not_is_refused(settings: dict[str, Any], told: str) -> None:
    config = AutoConfig.for_model("llama", **SMALL | {"num_hidden_layers": 4} | settings)
    found = audit(config, seq_len_tokens=256, cache=None)
    assert not found.right
    assert re.search(told, f"{found.about}: {found.reason}"), found.reason


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 24), ("hidden_size", 2048), ("intermediate_size", 8192)]
)
def test_a_large_model_is_audited_small(field: str, value: int) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    settings: dict[str, Any] = SMALL | sizes | {"vocab_size": 128256, field: value}
    found = audited(LlamaForCausalLM, LlamaConfig(**settings))
    assert found.right, found.reason
    assert found.layers == 2 and (found.parameters or 0) < 1_000_000
    assert found.shape is not None and found.shape["layers"] == {"num_hidden_layers": value}.get(field, 2)


def test_every_kind_of_layer_is_in_the_small_copy() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("gemma3_text", **SMALL | {"num_hidden_layers": 12}, head_dim=16, sliding_window=4096,
                                  layer_types=kinds * 2)  # fmt: skip
    assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=None).layers == 6


def test_audits_are_kept_by_digest_and_nothing_else_is_believed(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL)
    first = audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path)
    path = tmp_path / f"{first.digest}.json"
    assert first.right and Audit(**json.loads(path.read_text())) == first
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 77.0}))
    assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path).seconds == 77.0  # it was taken from there
    assert audit(config, seq_len_tokens=128, cache=tmp_path).digest != first.digest
    config.attention_dropout = 0.1
    assert not audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path).right
    path.write_text("{}")
    config.attention_dropout = 0.0
    again = audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path)
    assert again.right and again.digest == first.digest and again.seconds != 77.0


def test_the_digest_is_of_the_classs_source_too() -> None:
    own, plain = audited(OwnLlama), audited(LlamaForCausalLM)
    assert own.digest != plain.digest and replace(own, seconds=0.0).right


def test_an_audit_does_not_depend_on_its_surroundings() -> None:
    config = LlamaConfig(**SMALL)
    threads = torch.get_num_threads()
    with torch.no_grad(), torch.inference_mode(), torch.device("meta"):
        assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=None).right
    assert torch.get_num_threads() == threads


def test_only_audits_of_untouched_classes_of_transformers_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    config = LlamaConfig(**SMALL)
    assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, model_class=OwnLlama, cache=tmp_path).right
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: shifted(self.down_proj(self.up_proj(x))))
    assert not audit(config, seq_len_tokens=SEQ_LEN_TOKENS, model_class=LlamaForCausalLM, cache=tmp_path).right
    assert not list(tmp_path.iterdir())
