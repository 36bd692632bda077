"""How evenly experts are used: what a training over ranks measures is what one process counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rank_pool import RankPool
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.model import build_model, master_dtype, read_model_config
from sparsering.runtime.train.setup import set_up
from sparsering.traces.errors import InputError
from train_alone import pieces_of
from train_runs import write_run

Pools = Callable[[int], RankPool]
NARROW = {"head_dim": 8, "architectures": None, "pad_token_id": 0, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    # the first layer is dense
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 32, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 64},
    # experts are chosen by a score with a bias, beside shared ones
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                 "moe_intermediate_size": 32},
}  # fmt: skip


def _run(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    model = NARROW | {"model_type": family} | FAMILIES.get(family, {})
    asked = {"steps": 1, "dtype": "float64", "metrics": {"folder": str(folder / "metrics"), "expert_load": True}}
    return write_run(folder, model=model, **(asked | changes))


def _counted_alone(raw: dict[str, Any]) -> list[np.ndarray]:
    """Return how often each expert of each layer is called for the sequences of a step, from what routers return."""
    config = parse_config(raw)
    model: Any = build_model(
        config.model, read_model_config(config.model), device=torch.device("cpu"), dtype=master_dtype(config),
        seed=config.seed,
    )  # fmt: skip
    model.set_attn_implementation("eager")
    calls: dict[str, np.ndarray] = {}

    def count(name: str, experts: Any, args: Any) -> None:
        found = np.bincount(args[1].flatten().numpy(), minlength=experts.num_experts)
        calls[name] = calls.get(name, 0) + found

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: count(name, module, args))
    with torch.no_grad():
        for slot in range(config.sequences_per_step):
            model(input_ids=pieces_of(config, 0, slot, per_document=False)[0][None], use_cache=False)
    return list(calls.values())


@pytest.mark.parametrize(
    ("family", "ranks", "changes"),
    [
        ("qwen3_moe", 2, {"seq_len_tokens": 200}),  # the last stripe is padded
        ("qwen3_moe", 4, {"parallel": {"data": 2, "context": 2}, "microbatches": 2}),
        ("gpt_oss", 2, {}),
        ("glm4_moe", 2, {"dtype": "float32"}),  # whose routers keep their bias in float32
    ],
)
def test_shares_are_those_of_all_tokens(
    family: str, ranks: int, changes: dict[str, Any], tmp_path: Path, rank_pools: Pools
) -> None:
    config = _run(tmp_path, family, **changes)
    wanted = [counts / counts.sum() for counts in _counted_alone(config)]
    for result in rank_pools(ranks).run("expert_jobs.trained_gradients", config=config):
        shares = result["values"]["expert_share_per_layer"]
        np.testing.assert_allclose(shares, wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            result["values"]["expert_imbalance_per_layer"], [share.max() / share.mean() for share in wanted], rtol=1e-5
        )


def test_models_without_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^metrics\.expert_load: is on, but Qwen2ForCausalLM has no experts"):
        set_up(parse_config(_run(tmp_path, "qwen2")))


def test_experts_in_pieces_are_refused(tmp_path: Path) -> None:
    config = parse_config(_run(tmp_path, "qwen3_moe", memory={"mlp_tiles": 2}))
    with pytest.raises(InputError, match=r"^memory\.mlp_tiles and metrics\.expert_load: are on: "):
        set_up(config)
