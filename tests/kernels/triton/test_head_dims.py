"""Head dims: refused where no kernel takes them, by kernels, plans and commands alike; or padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from padded_cases import BETWEEN, SCALE, plan_of
from sparsering import cli
from sparsering.kernels import head_dims
from sparsering.kernels.backend import SHIPPED
from sparsering.kernels.select.probe import ShardTensors
from sparsering.kernels.select.vertical_slash import FixedVerticalSlash
from sparsering.planner.plan import KernelSpec, load_plan
from sparsering.planner.schedule.backends import BACKENDS, FASTEST, computed_head_dim, kernel_head_dim, known_backends
from sparsering.traces.errors import InputError, UnsupportedError
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from train_runs import write_run

pytest.importorskip("triton")
from sparsering.kernels.flash4 import backend as flash4_backend
from sparsering.kernels.flash4 import launch as flash4_launch
from sparsering.kernels.select import probe_triton
from sparsering.kernels.select.rows import block_mass_triton, xattention_triton
from sparsering.kernels.triton import launching


def test_the_planner_knows_what_the_kernels_have() -> None:
    assert set(BACKENDS) == {*SHIPPED}
    assert {KernelSpec(backend=name).backend for name in (*SHIPPED, FASTEST)} == set(known_backends())
    taken = BACKENDS["triton"]
    assert taken.head_dims == launching.HEAD_DIMS
    choosing = [one.CHOOSING_HEAD_DIMS for one in (probe_triton, xattention_triton, block_mass_triton)]
    assert choosing == [launching.HEAD_DIMS[:4]] * 3
    assert (taken.padded_step, taken.block_sizes) == (head_dims.PADDED_STEP, launching.BLOCK_SIZES)
    flash4 = BACKENDS["flash4"]
    assert (flash4.head_dims, flash4.block_sizes) == (flash4_backend.HEAD_DIMS, (flash4_launch.BLOCK_SIZE,))
    assert {getattr(torch, name) for name in flash4.dtypes or ()} == set(flash4_backend.DTYPES)


def test_planner_and_kernels_pad_alike() -> None:
    for dim in range(1, 600):
        try:
            found = head_dims.kernel_head_dim(dim)
        except ValueError as error:
            assert f"head dim {dim}" in str(error)
            found = None
        assert BACKENDS["triton"].kernel_head_dim(dim) == found
    assert [dim for dim in range(1, 600) if BACKENDS["triton"].kernel_head_dim(dim) not in (dim, None)] == BETWEEN


def test_heads_are_cut_into_powers_of_two() -> None:
    for dim in range(1, 130):
        cut = head_dims.pieces(dim)
        assert [n for piece in cut for n in range(piece.start, piece.stop)] == list(range(dim))
        sizes = [piece.stop - piece.start for piece in cut]
        assert sizes == sorted({1 << n for n in range(8) if dim >> n & 1}, reverse=True)


COMMON = {"dtype": "bfloat16", "block_size": 128}


@pytest.mark.parametrize(
    ("backend", "head_dim", "computed"),
    [
        ("triton", 64, 64), ("triton", 80, 128), ("triton", 96, 128), ("triton", 24, 32), ("triton", 192, 256),
        ("triton", 512, 512), ("flash4", 128, 128),
        ("fastest", 64, 64), ("fastest", 96, 128), ("blockwise", 96, 96), ("blockwise", 250, 250),
        ("reference", 7, 7),
    ],
)  # fmt: skip
def test_what_heads_are_computed_as(backend: str, head_dim: int, computed: int) -> None:
    assert computed_head_dim(backend, head_dim=head_dim, **COMMON) == computed
    assert kernel_head_dim(backend, head_dim) == computed


@pytest.mark.parametrize(
    ("backend", "given", "line"),
    [
        ("triton", {"head_dim": 520}, "head_dim: 520 is not what triton kernels take: 16, 32, 64, 128, 256, 512, or "
         "with padding other multiples of 8 below 512; blockwise, plain torch, takes any"),
        ("fastest", {"head_dim": 576}, "head_dim: 576 is not what flash4 or triton kernels take: 16, 32, 64, 128, 256, "
         "512, or with padding other multiples of 8 below 512; blockwise, plain torch, takes any"),
        ("triton", {"head_dim": 100}, "head_dim: 100 is not"),
        ("flash4", {"head_dim": 96}, "head_dim: 96 is not what flash4 kernels take: 64, 128; blockwise"),
        ("flash4", {"head_dim": 64, "block_size": 64}, "block_size: 64 is not what flash4 kernels take: 128;"),
        ("flash4", {"head_dim": 64, "dtype": "float32"},
         "dtype: float32 is not what flash4 kernels take: float16, bfloat16;"),
        ("triton", {"head_dim": 64, "block_size": 100}, "block_size: 100 is not what triton kernels take: 16, 32,"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_one_line(backend: str, given: dict[str, Any], line: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        computed_head_dim(backend, **COMMON | given)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_fastest_takes_what_one_of_them_takes() -> None:
    assert computed_head_dim("fastest", head_dim=64, dtype="float32", block_size=32) == 64
    with pytest.raises(InputError, match=r"^backend: 'abacus' is not one of reference, blockwise, triton"):
        computed_head_dim("abacus", head_dim=64, **COMMON)


@pytest.mark.parametrize(("head_dim", "backend"), [(520, "triton"), (576, "fastest"), (96, "flash4"), (12, "triton")])
def test_no_plan_is_made_or_read_for_what_no_kernel_takes(head_dim: int, backend: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"^head_dim: {head_dim} is not what"):
        plan_of(head_dim, backend)
    file = tmp_path / "plan.json"
    sealed = plan_of(head_dim, "blockwise").model_copy(
        update={"kernels": KernelSpec.model_validate({"backend": backend})}
    )
    sealed.model_copy(update={"digest": sealed.compute_digest()}).save(file)
    with pytest.raises(UnsupportedError) as caught:
        load_plan(file)
    assert str(caught.value).startswith(f"{file}: head_dim: {head_dim} is not what") and "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["triton", "fastest", "blockwise"])
def test_a_plan_for_padded_heads_is_made_and_read(backend: str, tmp_path: Path) -> None:
    made = plan_of(96, backend)
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, [*arguments])


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_the_command_plan_refuses_before_any_work(tmp_path: Path) -> None:
    drawn = SyntheticSettings(seq_len_tokens=1000, block_size=128, heads=4, columns=10, density=0.3)
    for head_dim in (96, 520):
        write_synthetic_trace(tmp_path / str(head_dim), "vertical-slash", drawn, kv_heads=2, head_dim=head_dim)

    def plan(head_dim: int, *options: str) -> Result:
        where = "--trace", str(tmp_path / str(head_dim)), "-o", str(tmp_path / "plan.json")
        return invoke("plan", *where, "--cluster", "local-cpu-4", *options)

    for backend in ("triton", "fastest", "flash4"):  # before the search, which finds that nothing fits
        line = refusal(plan(520, "--backend", backend, "--memory-limit-bytes", "1"))
        assert line.startswith("sparsering: head_dim: 520 is not what")
    assert "head_dim: 96 is not what flash4 kernels take: 64, 128" in refusal(plan(96, "--backend", "flash4"))
    assert not (tmp_path / "plan.json").exists()
    assert plan(96, "--evaluator", "recurrence", "--layout", "ring").exit_code == 0
    assert load_plan(tmp_path / "plan.json").model.head_dim == 96


def test_a_dry_run_of_training_refuses(tmp_path: Path) -> None:
    def dry_run(head_dim: int, **changes: Any) -> Result:
        folder = tmp_path / str(head_dim)
        write_run(folder, model={"head_dim": head_dim}, device="cuda", **changes)
        return invoke("train", str(folder / "config.yaml"), "--dry-run")

    assert refusal(dry_run(520)).startswith("sparsering: head_dim: 520 is not what triton kernels take")
    assert "head_dim: 576 is not what flash4 or triton kernels" in refusal(dry_run(576, plan={"backend": "fastest"}))
    assert "head_dim: 96 is not what flash4 kernels take" in refusal(dry_run(96, plan={"backend": "flash4"}))
    assert dry_run(96).exit_code == 0
    assert dry_run(520, plan={"backend": "blockwise"}).exit_code == 0
    assert dry_run(520, attention="dense-zigzag").exit_code == 0, "its kernels are torch's, the plan's are not run"


def shard_of(head_dim: int, device: str = "cpu") -> ShardTensors:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 512, n, head_dim, generator=generator).to(device) for n in (4, 2))
    return ShardTensors(q=q, k=k, positions=torch.arange(512, device=device), seq_len_tokens=512, block_size=64,
                        granularity_tokens=512)  # fmt: skip


def test_patterns_of_other_heads_are_chosen_without_kernels() -> None:
    taken = [probe_triton.tile_keys(shard_of(dim), 64) > 0 for dim in (64, 80, 96, 192, 256)]
    assert taken == [xattention_triton.applies(shard_of(dim), 16) for dim in (64, 80, 96, 192, 256)]
    assert taken == [True, False, False, False, False]


@pytest.mark.gpu
def test_choosing_on_a_gpu_chooses_alike() -> None:
    selector, masks = FixedVerticalSlash(columns=40, slashes=80), []
    for device in ("cpu", "cuda"):
        masks.append(selector.choose(shard_of(96, device), scale=SCALE).active.cpu())
    assert (masks[0] != masks[1]).sum() <= 2  # scores within rounding of the cut
