"""liger-kernel's layers in one model leave the others of its class as they are."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tiny_models import tiny_model

pytest.importorskip("liger_kernel")

from sparsering.runtime.model.layers.fused import fuse_layers


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24)[None]).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("times", [1, 2])
def test_models_on_the_cpu_go_on_as_they_are(family: str, times: int) -> None:
    before = tiny_model(family)
    wanted = _logits(before)
    fused: Any = None
    for _ in range(times):
        fused = tiny_model(family)
        fuse_layers(fused)
    mlp = fused.model.layers[0].mlp
    assert mlp.forward.__func__ is not type(mlp).forward  # it was really changed
    assert torch.equal(_logits(before), wanted)
    after = tiny_model(family)
    assert torch.equal(_logits(after), wanted)
    module: Any = sys.modules[type(after).__module__]
    rotated = module.apply_rotary_pos_emb
    assert rotated.__wrapped__.__module__ == module.__name__  # the plain one, wrapped once
    assert not [name for name, one in vars(module).items() if str(getattr(one, "__module__", "")).startswith("liger")]
