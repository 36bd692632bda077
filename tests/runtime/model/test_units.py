"""Layers that are gathered together train as layers that are gathered alone, and as the model without any ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rank_pool import RankPool
from sparsering.runtime.model.layers.units import UNIT_PARAMETERS, layers_of_a_unit, units
from train_alone import assert_same_training, trained_alone
from train_runs import write_run


@pytest.mark.parametrize(
    ("layers", "parameters", "together"),
    [
        (30, 3_540_096, 7),  # SmolLM2-135M: a quarter of the layers
        (40, 3_540_096, 9),  # 9 fit
        (36, 77_000_000, 1),  # Qwen2.5-3B
        (2, 1000, 1), (8, 1000, 2), (1, 1, 1), (4, 0, 1),
    ],
)  # fmt: skip
def test_how_many_go_together(layers: int, parameters: int, together: int) -> None:
    assert layers_of_a_unit(layers, parameters) == together


def test_units_are_all_layers_in_order() -> None:
    layers = [nn.Linear(4, 4) for _ in range(9)]
    assert units(layers) == [layers[0:2], layers[2:4], layers[4:6], layers[6:8], layers[8:9]]
    large = nn.Linear(1, UNIT_PARAMETERS, device="meta")
    assert units([*layers, large]) == [[layer] for layer in [*layers, large]]
    assert units([]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": {"checkpoint_layers": False}},
        {"memory": {"whole_layers": 3, "offload": True}, "microbatches": 2},
        {"verify": {"every_steps": 1}},
    ],
    ids=["recomputed", "whole", "partly, offloaded", "verified"],
)
def test_nine_layers_in_five_units(
    changes: dict[str, Any], tmp_path: Path, rank_pools: Callable[[int], RankPool]
) -> None:
    config = write_run(tmp_path, model={"num_hidden_layers": 9}, seq_len_tokens=192, steps=3, **changes)
    assert_same_training(rank_pools(2).run("train_jobs.run", config=config), trained_alone(config))
