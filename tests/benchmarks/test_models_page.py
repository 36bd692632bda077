"""The page of families: what is counted, what is not, and in which form a family is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sparsering.benchmarks.lib.families import (
    CARRIES_STATE,
    LOOKS_AHEAD,
    audited_tokens,
    causal_form,
    not_causal_without_state,
)
from sparsering.benchmarks.lib.models_page import BEGIN, END, write_page
from sparsering.runtime.audit.audit import causal_class
from sparsering.traces.files import write_json

ROWS: list[dict[str, Any]] = [
    {"family": "plain", "right": True, "seconds": 1.0, "gloo_gradient_error": 2e-15},
    {"family": "inner", "right": True, "seconds": 1.0, "audited_as": "its language model alone, Inner"},
    {"family": "coder", "right": True, "seconds": 1.0, "audited_as": "a decoder, is_decoder: true"},
    {"family": "short", "right": True, "seconds": 1.0, "right_up_to_tokens": 2048},
    {"family": "other", "right": False, "seconds": 1.0, "about": "audit", "reason": "off", "group": None},
    {"family": "state", "right": False, "seconds": 1.0, "about": "audit", "reason": "off", "group": CARRIES_STATE},
]


def test_the_share_is_of_what_is_counted_and_the_rest_has_its_groups(tmp_path: Path) -> None:
    document = {"versions": {"transformers": "5", "torch": "2"}, "date": "2026-01-01", "rows": ROWS}
    write_json(tmp_path / "models.json", document)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    write_page(tmp_path / "models.json", page)
    told = page.read_text()
    assert told.startswith("before\n") and told.endswith("after\n") and "old" not in told
    assert "of 6 families 5 are causal language models" in told
    assert "**4 of these 5 are right (80.0 %)**, 1 are refused" in told and "without them it is 3 of 5" in told
    assert "**Right**: `plain`, `short` (up to 2,048 tokens)\n" in told
    assert "**Right as its language model alone**: `inner` (`Inner`)\n" in told
    assert "**Right as a decoder**: `coder`\n" in told
    counted, _, others = told.partition("**Not counted, 1: layers carry a state")
    assert "`other`" in counted and "`state`" in others and "`state`" not in counted


def test_a_family_is_taken_in_the_form_in_which_it_is_a_causal_language_model() -> None:
    config, model_class, form = causal_form("gemma3")
    assert config.model_type == "gemma3_text" and model_class.__name__ == "Gemma3ForCausalLM"
    assert form == "its language model alone, Gemma3ForCausalLM"
    config, _, form = causal_form("bert")
    assert config.is_decoder and config.hidden_dropout_prob == 0.0 and form == "a decoder, is_decoder: true"
    assert causal_form("llama")[2] is None
    assert [audited_tokens(causal_form(one)[0], 1024) for one in ("llama", "roberta")] == [1024, 448]


@pytest.mark.parametrize(
    ("family", "settings", "wanted"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, CARRIES_STATE),
        ("mamba", {"state_size": 8}, CARRIES_STATE),
        ("bert", {"num_attention_heads": 4, "intermediate_size": 96}, LOOKS_AHEAD),
        ("bert", {"num_attention_heads": 4, "intermediate_size": 96, "is_decoder": True}, None),
    ],
)
def test_why_a_family_is_not_counted(family: str, settings: dict[str, Any], wanted: str | None) -> None:
    config = AutoConfig.for_model(family, vocab_size=256, hidden_size=64, num_hidden_layers=2, **settings)
    assert not_causal_without_state(config, causal_class(config), 256) == wanted
