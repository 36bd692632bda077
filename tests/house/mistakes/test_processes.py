"""Mistakes that only real processes show: several ranks, launchers, kernels that do not run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from interrupts import started
from mistakes import assert_one_line, listing
from ring_cases import Case, make_case_plan
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import PatternSpec
from sparsering.runtime.run.rank import crowded

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run triton.json", ["triton.json: kernels.backend"]),
        ("calibrate -o new.yaml --cluster local-cpu-4 --backend triton --device cpu", ["--backend"]),
    ],
)
def test_kernels_for_gpus_are_one_line_without_one(workspace: Path, arguments: str, says: list[str]):
    before = listing(workspace)
    with started(arguments, workspace) as command:
        code, stdout, stderr = command.end()
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, ["'triton'", "GPU", "--backend blockwise", *says])
    assert listing(workspace) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        (f"{TORCHRUN} 2 -m sparsering.cli", "run plan.json", ["4", "2"]),
        (f"{TORCHRUN} 2 -m sparsering.cli", "run cut-plan.json", ["cut-plan.json", "JSON"]),
        (f"{TORCHRUN} 1 -m sparsering.runtime.train", "run/config.yaml", ["2 ranks are configured, 1 were started"]),
        (f"{TORCHRUN} 2 -m sparsering.runtime.train", "train-other-plan.yaml", ["plan"]),
    ],
)
def test_under_torchrun_one_rank_says_it(workspace: Path, program: str, arguments: str, says: list[str]):
    """torchrun adds a summary of its own; of us there is one line."""
    with started(arguments, workspace, program=program) as command:
        code, stdout, stderr = command.end()
        assert command.processes() == []
    assert code != 0
    assert stdout == ""
    assert_one_line("\n".join(line for line in stderr.splitlines() if line.startswith("sparsering: ")), says)


@pytest.mark.slow
def test_directions_that_do_not_fit_together_are_one_line(tmp_path: Path):
    """Forward keeps K/V for a backward that begins with nothing: every file of it is good by itself."""
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout=Gather(keep_kv=True), pattern="gqa")
    plan = make_case_plan(case, backward=Ring(prefetch=1))
    pattern = PatternSpec(source="choose", selector="sink-window", settings={"window_tokens": 64})
    plan = plan.model_copy(update={"pattern": pattern, "columns_capacity": 64})
    plan.model_copy(update={"digest": plan.compute_digest()}).save(tmp_path / "kept.json")
    with started("run kept.json", tmp_path) as command:
        code, stdout, stderr = command.end()
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, ["kept K/V: forward keeps", "backward begins with nothing"])


def test_more_ranks_than_cores_are_warned_of():
    assert "4096 ranks on" in (crowded(4096, device="cpu") or "")
    assert crowded(1, device="cpu") is None
    assert crowded(4096, device="cuda") is None
