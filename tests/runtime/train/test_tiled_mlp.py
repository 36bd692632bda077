"""An MLP in pieces of its tokens: the same values, the same gradients, as exact, and refused where it would not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from model_cases import case_config
from rank_pool import RankPool
from sparsering.runtime.model.layers.tiled_mlp import require_tileable, tile_mlp
from sparsering.runtime.model.shape import decoder_layers
from sparsering.traces.errors import UnsupportedError
from train_runs import write_run

TOKENS = 37  # no multiple of the pieces


def _layer(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case_config(family), dtype=dtype)
    return decoder_layers(model.eval())[0]


def _gradients(mlp: nn.Module, x: torch.Tensor, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    out = mlp(leaf)
    named = dict(mlp.named_parameters())
    found = torch.autograd.grad(out, [leaf, *named.values()], grad_out)
    return {"out": out.detach(), "x": found[0], **dict(zip(named, found[1:], strict=True))}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite"])
@pytest.mark.parametrize("tiles", [2, 5, 64])
def test_values_and_gradients_are_those_of_the_whole(family: str, tiles: int) -> None:
    layer = _layer(family, torch.float64)
    require_tileable(layer)
    width = AutoModelForCausalLM.from_config(case_config(family)).config.hidden_size
    x, grad_out = torch.randn(2, 2, TOKENS, width, dtype=torch.float64).unbind()
    names = set(layer.state_dict())
    wanted = _gradients(layer.mlp, x, grad_out)
    tile_mlp(layer, tiles)
    found = _gradients(layer.mlp, x, grad_out)
    assert set(layer.state_dict()) == names
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_gradients_of_weights_are_rounded_once() -> None:
    x, grad_out = torch.randn(2, 1, 512, 64).bfloat16().unbind()
    exact = _gradients(_layer("llama", torch.float64).mlp, x.double(), grad_out.double())
    errors = {}
    for tiles in (1, 64):
        layer = _layer("llama", torch.bfloat16)
        layer.load_state_dict({k: v.bfloat16() for k, v in _layer("llama", torch.float64).state_dict().items()})
        tile_mlp(layer, tiles)
        found = _gradients(layer.mlp, x, grad_out)
        errors[tiles] = {name: (found[name].double() - exact[name]).norm() for name in exact}
    for name, error in errors[64].items():
        assert error <= 1.1 * errors[1][name], name


def test_a_frozen_weight_has_no_gradient() -> None:
    layer = _layer("llama", torch.float64)
    layer.mlp.gate_proj.weight.requires_grad_(requires_grad=False)
    tile_mlp(layer, 3)
    width = layer.mlp.gate_proj.in_features
    layer.mlp(torch.randn(1, TOKENS, width, dtype=torch.float64)).sum().backward()
    assert layer.mlp.gate_proj.weight.grad is None and layer.mlp.up_proj.weight.grad is not None


def test_what_looks_at_several_tokens_or_is_not_there_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).cumsum(1)

    layer = nn.Module()
    with pytest.raises(UnsupportedError, match=r"memory\.mlp_tiles: .*no part `mlp`"):
        require_tileable(layer)
    layer.mlp = Mixing()
    with pytest.raises(UnsupportedError, match=r"memory\.mlp_tiles: .*several tokens at once"):
        require_tileable(layer)


@pytest.mark.parametrize("memory", [{}, {"offload": True}, {"checkpoint_layers": False}], ids=str)
def test_a_run_in_pieces_is_the_run(
    memory: dict[str, Any], tmp_path: Path, rank_pools: Callable[[int], RankPool]
) -> None:
    runs = {}
    for tiles in (1, 4):
        config = write_run(tmp_path, steps=3, dtype="float64", memory={"mlp_tiles": tiles, **memory})
        runs[tiles] = rank_pools(2).run("train_jobs.run", config=config)[0]
    np.testing.assert_allclose(runs[4]["losses"], runs[1]["losses"], rtol=1e-12)
    for name, value in runs[1]["parameters"].items():
        np.testing.assert_allclose(runs[4]["parameters"][name], value, rtol=0, atol=1e-9, err_msg=name)
