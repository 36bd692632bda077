"""Faults planted in a model are caught by numbers, by the whole audit and by its proof alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from faulty_models import FAULTS, HIDDEN, MOE, SEQ_LEN_TOKENS, SMALL, OwnLlama, ShiftsLabelsItself, audited
from sparsering.runtime.audit.audit import small_model
from sparsering.runtime.audit.proof import prove
from sparsering.traces.errors import UnsupportedError


@pytest.mark.parametrize(("model_class", "changes"), HIDDEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_that_hides_from_a_small_copy_is_caught(model_class: Any, changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = SMALL | changes
    found = audited(model_class, LlamaConfig(**settings), seq_len_tokens=512)
    assert not found.right
    assert "what a token becomes depends on others" in f"{found.reason}", found.reason


@pytest.mark.parametrize(("model_class", "config", "reason"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_proof_alone_catches_a_planted_fault(model_class: Any, config: Any, reason: str) -> None:
    chosen = LlamaConfig(**SMALL) if config is None else config
    with pytest.raises(UnsupportedError):
        prove(small_model(chosen, model_class, SEQ_LEN_TOKENS))


@pytest.mark.parametrize(("model_class", "config", "reason"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_caught_by_numbers(model_class: Any, config: Any, reason: str) -> None:
    found = audited(model_class, config)
    assert not found.right
    assert re.search(reason, f"{found.about}: {found.reason}"), found.reason


def test_a_class_of_ones_own_without_a_fault_is_right() -> None:
    for found in (audited(OwnLlama), audited(Qwen3MoeForCausalLM, MOE), audited(ShiftsLabelsItself)):
        assert found.right, found.reason
        assert set(found.errors) == {"attach", "train"}
        assert all(0 <= error < 1e-12 for road in found.errors.values() for error in road.values())
        assert found.shape == {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
