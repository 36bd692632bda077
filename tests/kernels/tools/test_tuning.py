"""Launch settings that a user found with `doctor --kernels --tune`: from the file through the plan to the kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsering.cli import app
from sparsering.kernels.tools import tune
from sparsering.kernels.triton import tuning
from sparsering.kernels.triton.tuning import Launch
from sparsering.planner.plan import load_launches, load_plan
from sparsering.traces.errors import InputError

SHAPE = {"capability": 80, "block_size": 128, "head_dim": 128}
FOUND = Launch(m=64, n=32, warps=8, stages=3, tma=False)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    tuning.GIVEN.clear()
    yield
    tuning.GIVEN.clear()


def document() -> dict:
    return tune.launches_document(tune.Shape(), {tuning.FORWARD: FOUND}, capability=80)


def test_given_launches_are_used_where_they_were_tuned_for_and_nowhere_else():
    tuning.use(**document())
    assert tuning.launch_for(tuning.FORWARD, **SHAPE, itemsize=2) == FOUND
    for other in ({"capability": 90}, {"block_size": 64}, {"head_dim": 64}):
        assert tuning.launch_for(tuning.FORWARD, **(SHAPE | other), itemsize=2) != FOUND
    assert tuning.launch_for(tuning.FORWARD, **SHAPE, itemsize=4) != FOUND
    assert tuning.launch_for(tuning.GRAD_Q, **SHAPE, itemsize=2) != FOUND


@pytest.mark.parametrize(
    ("launches", "said"),
    [({"fastest": {}}, "'fastest' is not one of forward"), ({"forward": {"m": 64, "k": 1}}, "a launch has no k")],
)
def test_unknown_kernels_and_fields_are_refused(launches, said):
    with pytest.raises(ValueError, match=said):
        tuning.use(capability=80, head_dim=128, block_size=128, launches=launches)


@pytest.mark.parametrize(
    ("kernel", "tiles", "said"),
    [
        (tuning.FORWARD, {"m": 256}, "forward.m: 256 is no power of two from 16 to 128"),
        (tuning.GRAD_KV, {"m": 96}, "grad_kv.m: 96"),
        (tuning.FUSED_FORWARD, {"n": 128}, "fused_forward.n: 128 is no power of two from 16 to 64"),
    ],
)
def test_tiles_that_would_compute_something_else_are_refused(kernel, tiles, said):
    launches = {kernel: {**vars(FOUND), **tiles}}
    with pytest.raises(ValueError, match=said):
        tuning.use(capability=80, head_dim=128, block_size=128, launches=launches)
    assert not tuning.GIVEN


def test_every_candidate_is_one_that_may_be_given():
    jobs = tune.candidates(tune.Shape(), tma=True)
    for kernel, launch in jobs:
        tuning.use(**tune.launches_document(tune.Shape(), {kernel: launch}, capability=90))
    assert len(tuning.GIVEN) == len(tune.CANDIDATES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"launches": {"forward": {"m": 0, "n": 64, "warps": 4, "stages": 2, "tma": False}}}, "launches.forward.m"),
        ({"capability": "new"}, "capability"),
        ({"cpu": 1}, "cpu"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path: Path, change, said):
    path = tmp_path / "launches.json"
    path.write_text(json.dumps(document() | change))
    with pytest.raises(InputError, match=said) as caught:
        load_launches(path)
    assert str(path) in str(caught.value)


def test_a_plan_carries_the_launches_under_its_digest(tmp_path: Path):
    path, trace, plain, tuned = (tmp_path / name for name in ("launches.json", "trace", "plain.json", "tuned.json"))
    path.write_text(json.dumps(document()))
    run = CliRunner().invoke
    made = ["synthesize", "vertical-slash", "-o", str(trace), "--seq-len", "4096", "--heads", "4", "--columns", "16"]
    result = run(app, made)
    assert result.exit_code == 0, result.output
    for output, extra in ((plain, []), (tuned, ["--launches", str(path)])):
        arguments = ["plan", "--trace", str(trace), "--cluster", "a100-nvlink-8", "-o", str(output), *extra]
        result = run(app, arguments)
        assert result.exit_code == 0, result.output
    assert load_plan(plain).kernels.tuned is None
    kept = load_plan(tuned).kernels.tuned
    assert kept is not None
    assert kept.model_dump() == document()
    assert load_plan(plain).digest != load_plan(tuned).digest
    changed = json.loads(tuned.read_text())
    changed["kernels"]["tuned"]["launches"]["forward"]["m"] = 32
    tuned.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="digest"):
        load_plan(tuned)


def test_candidates_fit_the_block_and_have_caps_only_where_they_help():
    shape = tune.Shape(block_size=64)
    found = tune.candidates(shape, tma=False)
    assert {kernel for kernel, _ in found} == set(tune.CANDIDATES)
    assert all(max(launch.m, launch.n) <= 64 and not launch.registers and not launch.tma for _, launch in found)
    assert len(found) == len(set(found))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("arguments", [["--kernels"], ["--tune"], ["--kernels", "--tune"]])
def test_checking_kernels_needs_a_gpu(arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 2
    assert "GPU" in result.output or "--kernels" in result.output
