"""A rank that dies while another waits for it on a GPU, over NCCL: the other ends, with an error that names the rank.

Run with: pytest -m gpu tests/runtime/comm/test_gpu_failures.py -v -s
"""

from __future__ import annotations

import re

import pytest

from rank_pool import RankPool
from ring_cases import anchor_pattern
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
WORLD_SIZE = 2
PATIENCE_S = 5.0
LAYOUTS = {"ring": Ring(prefetch=1), "gather": Gather(chunks=1)}
PATTERN = anchor_pattern(seq_len_tokens=4096, density=0.2, columns=64, heads=4)


def _plan(layout: str) -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=4, kv_heads=2, head_dim=64),
            seq_len_tokens=PATTERN.seq_len_tokens,
            block_size=PATTERN.block_size,
            dtype="bfloat16",
            columns_capacity=64,
        ),
        placement=REGULAR_PLACEMENTS["striped"](
            seq_len_tokens=PATTERN.seq_len_tokens, world_size=WORLD_SIZE, granularity_tokens=128
        ),
        forward=LAYOUTS[layout],
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec(backend="triton"),
    )


@pytest.mark.parametrize(
    ("layout", "direction", "victim"),
    [("ring", "forward", 1), ("ring", "backward", 1), ("gather", "backward", 0)],
)
def test_a_rank_that_is_killed_is_named(
    layout: str, direction: str, victim: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Either the main thread comes back from the device and raises, or the process ends with the line on stderr."""
    import torch

    if torch.cuda.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} GPUs, this host has {torch.cuda.device_count()}")
    pool = RankPool(WORLD_SIZE, device="cuda", patience_s=PATIENCE_S)
    try:
        answers = pool.answers(
            "attention_and_die",
            plan=_plan(layout),
            pattern=PATTERN,
            direction=direction,
            victim=victim,
            check_patterns=True,
        )
    finally:
        pool.close()
    errors = capfd.readouterr().err
    answer = answers[1 - victim]
    print(f"{layout} {direction}: the survivor", "was ended" if answer is None else "raised")
    assert answers[victim] is None
    ok, told = (False, errors) if answer is None else answer
    assert not ok, told
    host = "" if victim else ", which hosts the store,"  # nobody can be asked then
    assert re.search(rf"rank {victim} of {WORLD_SIZE}{host} stopped answering", told), f"{told}\n{errors}"
    assert "terminate called" not in errors  # torch's watchdog did not come first
