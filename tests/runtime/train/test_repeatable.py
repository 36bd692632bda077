"""The same run twice on CPUs: every bit of every parameter is equal after twenty steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rank_pool import RankPool
from train_runs import write_run

PATTERN = {"selector": "vertical-slash", "settings": {"columns": 8, "slashes": 2, "window_tokens": 64}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps_are_equal_bit_by_bit(dtype: str, tmp_path: Path, rank_pools: Callable[[int], RankPool]) -> None:
    config = write_run(tmp_path, steps=20, dtype=dtype, plan={"layout": "ring", "pattern": PATTERN})
    first, second = (rank_pools(2).run("train_jobs.run", config=config)[0] for _ in range(2))
    assert len(first["losses"]) == 20
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    for name, parameter in first["parameters"].items():
        assert parameter.tobytes() == second["parameters"][name].tobytes(), name
