"""Head dims: refused where no kernel takes them, padded where a larger kernel can, priced as what is computed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner, Result

import kernel_calls as calls
import tiny
from rank_pool import RankPool
from ring_cases import PATTERNS, Case, expected, make_case_plan
from sparsering import cli
from sparsering.kernels import api, head_dims
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.plain.reference import reference_attention, reference_gradients
from sparsering.kernels.select.probe import ShardTensors
from sparsering.kernels.select.vertical_slash import FixedVerticalSlash
from sparsering.kernels.tools import accuracy
from sparsering.planner.backends import FASTEST, TAKEN, computed_head_dim, kernel_head_dim
from sparsering.planner.cost.kernels import DatasheetCost, datasheet_cost
from sparsering.planner.cost.memory import layer_memory
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, load_plan, make_plan
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import striped
from sparsering.planner.schedule.schedule import DIRECTIONS, KV_HOME, Direction, ShardId, Task
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import TaskWork
from sparsering.traces.errors import InputError, UnsupportedError
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from train_runs import write_run

pytest.importorskip("triton")
from sparsering.kernels.flash4 import backend as flash4_backend
from sparsering.kernels.flash4 import launch as flash4_launch
from sparsering.kernels.select import probe_triton, xattention_triton
from sparsering.kernels.triton import backend as triton
from sparsering.kernels.triton import gradients, launching

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
BETWEEN = [dim for dim in range(8, 128, 8) if dim not in (16, 32, 64)]


# What is taken


def test_the_planner_knows_what_the_kernels_have() -> None:
    assert TAKEN.keys() == api.BACKENDS.keys()
    assert {*TAKEN, FASTEST} == set(get_args(KernelSpec.model_fields["backend"].annotation))
    taken = TAKEN["triton"]
    assert taken.head_dims == launching.HEAD_DIMS == probe_triton.HEAD_DIMS == xattention_triton.HEAD_DIMS
    assert (taken.padded_step, taken.block_sizes) == (head_dims.PADDED_STEP, launching.BLOCK_SIZES)
    flash4 = TAKEN["flash4"]
    assert (flash4.head_dims, flash4.block_sizes) == (flash4_backend.HEAD_DIMS, (flash4_launch.BLOCK_SIZE,))
    assert {getattr(torch, name) for name in flash4.dtypes or ()} == set(flash4_backend.DTYPES)


def test_planner_and_kernels_pad_alike() -> None:
    for dim in range(1, 300):
        try:
            found = head_dims.kernel_head_dim(dim)
        except ValueError as error:
            assert f"head dim {dim}" in str(error)
            found = None
        assert TAKEN["triton"].kernel_head_dim(dim) == found
    assert [dim for dim in range(1, 300) if TAKEN["triton"].kernel_head_dim(dim) not in (dim, None)] == BETWEEN


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
        ("triton", 64, 64), ("triton", 80, 128), ("triton", 96, 128), ("triton", 24, 32), ("flash4", 128, 128),
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
        ("triton", {"head_dim": 256}, "head_dim: 256 is not what triton kernels take: 16, 32, 64, 128, or with padding "
         "other multiples of 8 below 128; blockwise, plain torch, takes any"),
        ("fastest", {"head_dim": 192}, "head_dim: 192 is not what flash4 or triton kernels take: 16, 32, 64, 128, "
         "or with padding other multiples of 8 below 128; blockwise, plain torch, takes any"),
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


def plan_of(head_dim: int, backend: str, *, columns: int = 16, dtype: str = "float16", world_size: int = 2) -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=4, kv_heads=2, head_dim=head_dim),
            seq_len_tokens=512,
            block_size=64,
            dtype=dtype,
            columns_capacity=columns,
        ),
        placement=striped(seq_len_tokens=512, world_size=world_size, granularity_tokens=64),
        forward=Gather(chunks=1),
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec.model_validate({"backend": backend}),
    )


@pytest.mark.parametrize(("head_dim", "backend"), [(256, "triton"), (192, "fastest"), (96, "flash4"), (12, "triton")])
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
    for head_dim in (96, 256):
        write_synthetic_trace(tmp_path / str(head_dim), "vertical-slash", drawn, kv_heads=2, head_dim=head_dim)

    def plan(head_dim: int, *options: str) -> Result:
        where = "--trace", str(tmp_path / str(head_dim)), "-o", str(tmp_path / "plan.json")
        return invoke("plan", *where, "--cluster", "local-cpu-4", *options)

    for backend in ("triton", "fastest", "flash4"):  # before the search, which finds that nothing fits
        line = refusal(plan(256, "--backend", backend, "--memory-limit-bytes", "1"))
        assert line.startswith("sparsering: head_dim: 256 is not what")
    assert "head_dim: 96 is not what flash4 kernels take: 64, 128" in refusal(plan(96, "--backend", "flash4"))
    assert not (tmp_path / "plan.json").exists()
    assert plan(96, "--evaluator", "recurrence", "--layout", "ring").exit_code == 0
    assert load_plan(tmp_path / "plan.json").model.head_dim == 96


def test_a_dry_run_of_training_refuses(tmp_path: Path) -> None:
    def dry_run(head_dim: int, **changes: Any) -> Result:
        folder = tmp_path / str(head_dim)
        write_run(folder, model={"head_dim": head_dim}, device="cuda", **changes)
        return invoke("train", str(folder / "config.yaml"), "--dry-run")

    assert refusal(dry_run(256)).startswith("sparsering: head_dim: 256 is not what triton kernels take")
    assert "head_dim: 192 is not what flash4 or triton kernels" in refusal(dry_run(192, plan={"backend": "fastest"}))
    assert "head_dim: 96 is not what flash4 kernels take" in refusal(dry_run(96, plan={"backend": "flash4"}))
    assert dry_run(96).exit_code == 0
    assert dry_run(256, plan={"backend": "blockwise"}).exit_code == 0
    assert dry_run(256, attention="dense-zigzag").exit_code == 0, "its kernels are torch's, the plan's are not run"


# What it costs

OWN = ShardId(sequence_part=0)
KEYS = Task(query=OWN, key=OWN, heads=(0, 4), key_buffer=KV_HOME)
COLUMNS = Task(query=OWN, key=None, heads=(0, 4), key_buffer="columns:home", kind="columns")
WORK = TaskWork(tile_pairs=900, rows_with_work=90, longest_row=10, key_rows_with_work=80, longest_key_row=12, rows=100)


def price(head_dim: int, backend: str, direction: Direction, *tasks: Task, bandwidth: float | None = None) -> float:
    gpu = tiny.cluster().gpu.model_copy(update={"memory_bandwidth_bytes_per_us": bandwidth})
    model = ModelShape(layers=1, heads=4, kv_heads=2, head_dim=head_dim)
    cost = datasheet_cost(gpu, model, block_size=128, backend=backend)
    return cost.launch_us(Launch(tasks=tasks), [WORK] * len(tasks), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tasks", [(KEYS,), (COLUMNS,), (COLUMNS, KEYS)], ids=["keys", "columns", "both"])
def test_padded_heads_are_computed_at_the_price_of_what_they_are_padded_to(
    direction: Direction, tasks: tuple[Task, ...]
) -> None:
    for backend in ("triton", "fastest"):
        assert price(96, backend, direction, *tasks) == price(80, backend, direction, *tasks)
        assert price(96, backend, direction, *tasks) == price(128, backend, direction, *tasks)
        # Accumulators as large, and copies besides.
        assert price(96, backend, direction, *tasks, bandwidth=1e4) > price(
            128, backend, direction, *tasks, bandwidth=1e4
        )
    assert price(96, "blockwise", direction, *tasks) < price(128, "blockwise", direction, *tasks)


def test_copies_of_padded_heads_by_hand() -> None:
    """bfloat16, alone on its queries, K/V heads shared by two: every copy reads one size and writes the other."""
    rows = 100 * 128

    def moved_bytes(head_dim: int, direction: Direction) -> float:
        given = (head_dim, "triton", direction, KEYS)
        return price(*given, bandwidth=1.0) - price(*given)

    forward = 2 + 2 * 2 / 2 + 2  # q; k and v; out
    backward = 2 * 2 + 2 * 2 / 2 + 2 + 2 * 4 / 2  # q and dout; k and v; dq; dk and dv in float32
    for direction, copied in zip(DIRECTIONS, (forward, backward), strict=True):
        more = moved_bytes(96, direction) - moved_bytes(128, direction)
        assert more == pytest.approx(rows * (96 + 128) * copied)


def test_what_is_not_padded_costs_what_it_did() -> None:
    gpu, model = tiny.cluster().gpu, ModelShape(layers=1, heads=4, kv_heads=2, head_dim=64)
    made = datasheet_cost(gpu, model, block_size=128)
    assert replace(made, computed_head_dim=None) == DatasheetCost(
        gpu=gpu, head_dim=64, block_size=128, queries_per_kv_head=2, heads=4
    )
    assert price(64, "triton", "backward", KEYS, bandwidth=1.0) == replace(
        made, gpu=gpu.model_copy(update={"memory_bandwidth_bytes_per_us": 1.0}), computed_head_dim=None
    ).launch_us(Launch(tasks=(KEYS,)), [WORK], "backward")


def launch_peak_bytes(shape: AttentionShape, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return what torch's allocator gives one backward launch, of the own keys and the columns, beyond its inputs."""
    tokens, heads = shape.tokens_per_rank, (shape.heads, shape.heads, shape.kv_heads, shape.kv_heads)
    run = gradients.run

    def run_and_forget(*given: Any, **named: Any) -> None:
        run(*given, **named)
        gc.collect()  # the interpreter holds arguments in a cycle

    monkeypatch.setattr(gradients, "run", run_and_forget)
    mask = AttentionMask(
        seq_len_tokens=tokens, block_size=64, active=torch.ones(shape.heads, tokens // 64, dtype=torch.bool),
        columns=torch.arange(shape.columns_capacity, dtype=torch.int32).repeat(shape.heads, 1),
    )  # fmt: skip
    at = torch.arange(tokens)
    common: dict[str, Any] = {"backend": "triton"}
    grad_out, q, k, v = (torch.zeros(1, tokens, n, shape.head_dim, dtype=torch.float16) for n in heads)
    index, of_columns = api.block_index(mask, at, at, **common), api.column_index(mask, at, **common)
    gathered = api.gather_columns(k, v, of_columns)
    grads = {
        name: torch.empty_like(x, dtype=torch.float32) for name, x in (("grad_q", q), ("grad_k", k), ("grad_v", v))
    }
    of_gathered = torch.zeros_like(gathered, dtype=torch.float32)
    rows = torch.zeros(2, 1, shape.heads, tokens)
    given: dict[str, Any] = {"columns": (gathered[0], gathered[1], of_columns), "grad_columns": tuple(of_gathered)}
    given |= {"final_q": torch.empty_like(q), "add_q": False, "add_kv": False, "scale": SCALE}
    assert of_columns.data.usable.numel() and of_columns.data.first_tile.numel()  # made at the first use, and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        calls.block_backward(grad_out, q, k, v, rows[0], rows[1], index, **grads, **given, **common)
        gc.collect()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in in_order]  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
    return max(itertools.accumulate(changes))


@interpreted
@pytest.mark.parametrize("head_dim", [96, 80])
def test_a_launch_of_padded_heads_needs_what_the_plan_says(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan counts beyond gradients as they are returned, and dq, which the last launch writes as one of them."""
    plan = plan_of(head_dim, "triton", world_size=1)
    shape, schedule = plan.attention_shape(), plan.schedule("backward")
    predicted = layer_memory(schedule, shape, backend="triton").workspace_bytes + shape.kv_bytes
    assert launch_peak_bytes(shape, monkeypatch) == pytest.approx(predicted, rel=0.05)


def test_copies_of_padded_heads_are_counted_and_nothing_that_travels() -> None:
    """Two shards, of which each launch reads one; by hand."""
    plan = plan_of(96, "fastest", columns=0)
    shape, schedules = plan.attention_shape(), [plan.schedule(direction) for direction in DIRECTIONS]
    for schedule in schedules:
        padded, plain = (layer_memory(schedule, shape, backend=name) for name in ("fastest", "blockwise"))
        assert layer_memory(schedule, shape, backend="triton") == padded
        assert replace(padded, workspace_bytes=plain.workspace_bytes) == plain
        # q and dout copied, dq in float32; k and v copied, dk and dv in float32; and dq as it is returned.
        rows = 128 * (4 * (2 + 2 + 4) + 2 * 2 * (2 + 4)) + 4 * 96 * 2
        returned = 96 * 2 * (4 + 2 * 2)
        wanted = 256 * (rows - returned) if schedule.direction == "backward" else 0
        assert padded.workspace_bytes - plain.workspace_bytes == wanted
    as_it_is = plan_of(64, "triton")
    assert (
        layer_memory(as_it_is.schedule("backward"), as_it_is.attention_shape(), backend="triton").workspace_bytes == 0
    )


# What is computed

SCALE = 0.3
NAMES = ("out", "lse", "dq", "dk", "dv")
Tensors = list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One seeded problem: head 0 has no active block, what lies behind the sequence is NaN."""

    head_dim: int
    tokens: int = 150
    padding: int = 10
    block: int = 32
    toeplitz: bool = True
    heads: tuple[int, int] = (4, 2)
    columns: int = 40
    documents: bool = False
    batch: int = 1
    dtype: torch.dtype = torch.float64

    def make(self, device: str = "cpu") -> tuple[Tensors, AttentionMask]:
        """([grad_out, q, k, v], mask)."""
        generator = torch.Generator().manual_seed(self.head_dim)
        heads, kv_heads = self.heads
        blocks = -(-self.tokens // self.block)
        shape = (heads, blocks) if self.toeplitz else (heads, blocks, blocks)
        active = torch.rand(shape, generator=generator) < 0.5
        active[0] = False
        columns = None
        if self.columns:
            late = self.tokens // 4  # head 0 has no column before, so that its first rows are empty
            firsts = [late] + [0] * (heads - 1)
            drawn = [n + torch.randperm(self.tokens - n, generator=generator)[: self.columns] for n in firsts]
            columns = torch.stack([one.sort().values for one in drawn]).int()
            columns[-1, self.columns // 2 :] = self.tokens
        at = torch.arange(self.tokens + self.padding)
        mask = AttentionMask(
            seq_len_tokens=self.tokens, block_size=self.block, active=active, columns=columns,
            documents=(at // (self.tokens // 3)).int() if self.documents else None,
        )  # fmt: skip
        sizes = [(self.batch, len(at), count, self.head_dim) for count in (heads, heads, kv_heads, kv_heads)]
        tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        for tensor in tensors:
            tensor[:, self.tokens :] = torch.nan
        return [tensor.to(device, self.dtype) for tensor in tensors], mask.to(device)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch.empty gives holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty((2, 3), dtype=torch.float16).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def reference(tensors: Tensors, mask: AttentionMask) -> Tensors:
    grad_out, q, k, v = tensors
    grads = reference_gradients(grad_out, q, k, v, mask, scale=SCALE)
    return [*reference_attention(q, k, v, mask, scale=SCALE), *grads]


def at_once(tensors: Tensors, mask: AttentionMask) -> Tensors:
    grad_out, *inputs = tensors
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out, lse = api.full_attention(q, k, v, mask, scale=SCALE, backend="triton")
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out)]


def by_tasks(tensors: Tensors, mask: AttentionMask, *, apart: bool = False, narrow: bool = False) -> Tensors:
    """As a ring plays it: two shards of every other block; columns in the first launch, results ended by the last one.

    apart: columns in a launch of their own. narrow: dK and dV of a task are rounded to q's dtype. Accumulators hold
    NaN until they are begun.
    """
    grad_out, q, k, v = tensors
    everything, accumulator = torch.arange(q.shape[1], device=q.device), api.accumulator_dtype(q.dtype)
    blocks = everything.split(mask.block_size)
    shards = [torch.cat(blocks[0::2]), torch.cat(blocks[1::2])]
    common: dict[str, Any] = {"scale": SCALE, "backend": "triton"}
    indexes = [api.column_index(mask, at, backend="triton") for at in shards]
    gathered = sum(api.gather_columns(k[:, at], v[:, at], index) for at, index in zip(shards, indexes, strict=True))
    assert isinstance(gathered, torch.Tensor) and gathered.shape[-1] == q.shape[3]
    grad_columns = torch.zeros_like(gathered, dtype=accumulator)
    whole_grads = [torch.full_like(x, torch.nan, dtype=accumulator) for x in (q, k, v)]
    key_grads = [[torch.full_like(x[:, at], torch.nan, dtype=accumulator) for x in (k, v)] for at in shards]
    begun: set[int] = set()
    out, lse = torch.full_like(q, torch.nan), whole_grads[0].new_full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    for own, at in enumerate(shards):
        columns, partial = (gathered[0], gathered[1], indexes[own]), None
        order = [1 - own, own]
        if apart:
            partial = calls.column_forward(q[:, at], *columns, **common)
        for number, other in enumerate(order):
            keys = shards[other]
            index = api.block_index(mask, at, keys, backend="triton")
            given = {"columns": None if apart or number else columns, "into": partial, "final": number == 1}
            partial = calls.block_forward(q[:, at], k[:, keys], v[:, keys], index, **common, **given)
        assert partial is not None and partial[0].dtype == q.dtype and partial[0].shape == q[:, at].shape
        out[:, at], lse[:, :, at] = partial
        rows = lse[:, :, at], api.backend_of("triton").row_products(grad_out[:, at], partial[0])
        total = torch.full_like(q[:, at], torch.nan, dtype=accumulator)
        final = torch.full_like(q[:, at], torch.nan) if accumulator != q.dtype else None
        if apart:
            into = dict(zip(("grad_column_k", "grad_column_v"), grad_columns, strict=True))
            calls.column_backward(
                grad_out[:, at], q[:, at], *columns[:2], *rows, columns[2], grad_q=total, add_q=False, **into, **common
            )
        for number, other in enumerate(order):
            keys = shards[other]
            index = api.block_index(mask, at, keys, backend="triton")
            grads, add = key_grads[other], other in begun
            if narrow:
                grads, add = [torch.full_like(x[:, keys], torch.nan) for x in (k, v)], False
            given = {} if apart or number else {"columns": columns, "grad_columns": (grad_columns[0], grad_columns[1])}
            calls.block_backward(
                grad_out[:, at], q[:, at], k[:, keys], v[:, keys], *rows, index, grad_q=total, grad_k=grads[0],
                grad_v=grads[1], add_q=apart or number > 0, add_kv=add, final_q=final if number else None, **given,
                **common,
            )  # fmt: skip
            for ours, part in zip(key_grads[other], grads, strict=True):
                if narrow:
                    api.backend_of("triton").add_up(ours, part[None], add=other in begun)
            begun.add(other)
        whole_grads[0][:, at] = (total if final is None else final).to(accumulator)
    for at, index, (grad_k, grad_v) in zip(shards, indexes, key_grads, strict=True):
        api.scatter_column_pair((grad_columns[0], grad_columns[1]), mask, at, index, grad_k=grad_k, grad_v=grad_v)
        whole_grads[1][:, at], whole_grads[2][:, at] = grad_k, grad_v
    return [out, lse, *whole_grads]


def assert_same(ours: Tensors, right: Tensors, valid: int, tolerance: float) -> None:
    dead = right[1] == -torch.inf
    assert dead[:, :, :valid].any(), "no row is empty"
    assert torch.equal(ours[1] == -torch.inf, dead) and (ours[0].transpose(1, 2)[dead] == 0).all()
    for name, found, wanted in zip(NAMES, ours, right, strict=True):
        assert found.shape == wanted.shape, name
        if name == "lse":
            torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0, msg=name)
        else:
            assert torch.isfinite(found).all(), f"{name} holds NaN or inf"
            torch.testing.assert_close(found[:, :valid].double(), wanted[:, :valid], atol=tolerance, rtol=0, msg=name)


KINDS: dict[str, dict[str, Any]] = {
    "toeplitz, ragged": {},
    "block mask": {"toeplitz": False, "tokens": 128, "padding": 0},
    "documents, blocks alone": {"documents": True, "columns": 0},
    "float32, batch of 2, 4:1": {"dtype": torch.float32, "batch": 2, "heads": (4, 1), "tokens": 90, "padding": 6},
}


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [80, 96])
def test_padded_heads_agree_with_the_definition(head_dim: int, kind: str) -> None:
    case = Drawn(head_dim=head_dim, **KINDS[kind])
    tensors, mask = case.make()
    tolerance = 1e-10 if case.dtype == torch.float64 else 2e-5
    assert_same(at_once(tensors, mask), reference(tensors, mask), case.tokens, tolerance)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim", [dim for dim in BETWEEN if dim not in (80, 96)])
def test_every_multiple_of_eight_is_padded(head_dim: int) -> None:
    tensors, mask = Drawn(head_dim=head_dim, tokens=60, padding=4, heads=(2, 1), columns=9).make()
    assert_same(at_once(tensors, mask), reference(tensors, mask), 60, 1e-10)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "apart"),
    [(80, torch.float64, True), (96, torch.float64, False), (80, torch.float32, False), (96, torch.float32, True)],
)
def test_padded_heads_task_by_task(head_dim: int, dtype: torch.dtype, apart: bool) -> None:
    tensors, mask = Drawn(head_dim=head_dim, dtype=dtype, toeplitz=dtype == torch.float64).make()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_same(by_tasks(tensors, mask, apart=apart), reference(tensors, mask), 150, tolerance)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("head_dim", [80, 96])
def test_padded_heads_in_sixteen_bits(head_dim: int, narrow: bool) -> None:
    """float16: sums in float32, ended in 16 bits; gradients of a task rounded where they are to be sent."""
    check_in_sixteen_bits(Drawn(head_dim=head_dim, dtype=torch.float16), "cpu", narrow=narrow)


def check_in_sixteen_bits(case: Drawn, device: str, *, narrow: bool) -> None:
    """Hold the error of every result to twice that of plain torch; narrow: a task's dK and dV are rounded once more."""
    tensors, mask = case.make(device)
    right, ours = reference(tensors, mask), by_tasks(tensors, mask, narrow=narrow)
    plain = plain_torch(tensors, mask)
    valid = slice(0, case.tokens)
    torch.testing.assert_close(ours[1].double(), right[1], atol=2e-3, rtol=0)
    for name, found, theirs, wanted in zip(NAMES, ours, plain, right, strict=True):
        if name != "lse":
            error, allowed = ((x.double() - wanted)[:, valid].abs().max() for x in (found, theirs))
            assert torch.isfinite(found).all(), name
            assert error <= 2 * allowed, f"{name}: {error:.3e} is more than twice {allowed:.3e}"


def plain_torch(tensors: Tensors, mask: AttentionMask) -> Tensors:
    """[out, out, dq, dk, dv] of dense attention in the inputs' own dtype: the errors that rounding alone makes."""
    grad_out, *inputs = (x.nan_to_num(0.0) for x in tensors)
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    positions, group = torch.arange(q.shape[1], device=q.device), q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    allowed = torch.stack([whole(mask, head, positions, positions) for head in range(q.shape[2])])
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)) * SCALE
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1).nan_to_num(0.0).to(q.dtype)
    out = (torch.where(allowed, weights, 0.0) @ values).transpose(1, 2)
    return [out.detach(), out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_gradients_without_accumulators() -> None:
    """What one device alone runs: block part and columns in one launch, delta from out."""
    (grad_out, q, k, v), mask = Drawn(head_dim=96, tokens=100, padding=28).make()
    everything = torch.arange(128)
    index, of_columns = triton.block_index(mask, everything, everything), triton.column_index(mask, everything)
    gathered = triton.gather_columns(k, v, of_columns)
    columns = gathered[0], gathered[1], of_columns
    out, lse = triton.block_forward(q, k, v, index, scale=SCALE, columns=columns)
    *grads, parts = triton.full_gradients(grad_out, q, k, v, out, lse, index, scale=SCALE, columns=columns)
    assert parts is not None and parts[0].shape == columns[0].shape
    triton.scatter_columns(*parts, of_columns, grad_k=grads[1], grad_v=grads[2])
    assert_same([out, lse, *grads], reference([grad_out, q, k, v], mask), 100, 1e-10)


@interpreted
def test_earlier_partials_are_merged_where_they_lie() -> None:
    """As without padding: out and lse of the accumulator's dtype are overwritten and come back."""
    (_, q, k, v), mask = Drawn(head_dim=80, tokens=64, padding=0, columns=0).make()
    index = api.block_index(mask, torch.arange(64), torch.arange(64), backend="triton")
    earlier = torch.zeros_like(q), torch.full((1, 4, 64), -torch.inf, dtype=q.dtype)
    out, lse = calls.block_forward(q, k, v, index, scale=SCALE, into=earlier)
    assert out is earlier[0] and lse is earlier[1]
    torch.testing.assert_close(out, reference_attention(q, k, v, mask, scale=SCALE)[0], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="into: shapes"):
        calls.block_forward(q, k, v, index, scale=SCALE, into=(earlier[0][..., :64], earlier[1]))


@interpreted
@pytest.mark.parametrize("head_dim", [192, 256, 100])
def test_larger_heads_are_refused_by_the_kernels_too(head_dim: int) -> None:
    (_, q, k, v), mask = Drawn(head_dim=head_dim, tokens=64, padding=0, columns=0).make()
    index = api.block_index(mask, torch.arange(64), torch.arange(64), backend="triton")
    with pytest.raises(
        ValueError, match=f"^q: head dim {head_dim} is not one of .*, nor another multiple of 8 below 128"
    ):
        calls.block_forward(q, k, v, index, scale=SCALE)


@interpreted
@pytest.mark.parametrize("layout", [Gather(chunks=1), Ring(), Ulysses(degree=2)])
def test_ranks_with_padded_heads(layout: Layout, rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout=layout,
                pattern="gqa")  # fmt: skip
    plan = make_case_plan(case, backend="triton", dtype="float32", head_dim=80)
    results = rank_pools(2).run("attention", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=7)
    placed = plan.make_placement()
    wanted = expected("gqa", placed.padded_tokens, seed=7, head_dim=80)
    for rank, result in enumerate(results):
        rows = placed.positions(rank)
        for name in ("out", "dq", "dk", "dv"):
            assert abs(result[name] - wanted[name][:, rows]).max() <= 1e-4, (rank, name)


# Choosing


def shard_of(head_dim: int, device: str = "cpu") -> ShardTensors:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 512, n, head_dim, generator=generator).to(device) for n in (4, 2))
    return ShardTensors(q=q, k=k, positions=torch.arange(512, device=device), seq_len_tokens=512, block_size=64,
                        granularity_tokens=512)  # fmt: skip


def test_patterns_of_other_heads_are_chosen_without_kernels() -> None:
    taken = [probe_triton.tile_keys(shard_of(dim), 64) > 0 for dim in (64, 80, 96, 192, 256)]
    assert taken == [xattention_triton.applies(shard_of(dim), 16) for dim in (64, 80, 96, 192, 256)]
    assert taken == [True, False, False, False, False]


# On a GPU


def padded_cases() -> list[accuracy.Case]:
    return [case for case in accuracy.cases() if case.head_dim not in launching.HEAD_DIMS]


def test_doctor_checks_padded_heads() -> None:
    assert {case.head_dim for case in padded_cases()} == {80, 96}


@pytest.mark.gpu
@pytest.mark.parametrize("case", padded_cases(), ids=str)
def test_errors_on_a_gpu(case: accuracy.Case) -> None:
    ratios = accuracy.error_ratios(case, "triton", torch.device("cuda"))
    assert all(ratio <= accuracy.ALLOWED_RATIO for ratio in ratios.values()), ratios


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [80, 96, 24, 120])
def test_errors_task_by_task_on_a_gpu(head_dim: int, dtype: torch.dtype, narrow: bool) -> None:
    case = Drawn(head_dim=head_dim, dtype=dtype, tokens=1000, padding=24, block=128, heads=(16, 2), columns=70)
    check_in_sixteen_bits(case, "cuda", narrow=narrow)


@pytest.mark.gpu
def test_choosing_on_a_gpu_chooses_alike() -> None:
    selector, masks = FixedVerticalSlash(columns=40, slashes=80), []
    for device in ("cpu", "cuda"):
        masks.append(selector.choose(shard_of(96, device), scale=SCALE).active.cpu())
    assert (masks[0] != masks[1]).sum() <= 2  # scores within rounding of the cut
