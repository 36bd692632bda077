"""Planned rings on the GPUs of one host: layouts × masks, against the same kernels without communication.

    python -m sparsering.benchmarks.ring --gpus 8 --seq-len 524288 --density 0.05 0.02
    python -m sparsering.benchmarks.ring --gpus 8 --two-nodes --layout hierarchical:inner_size=4 --layout ring

One process group, one run. `compute_ms` plays the same schedule with channels that send nothing: the slowest rank's
kernels alone. `exposed_ms` is what the whole step takes beyond that.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.mask import AttentionMask
from ..planner.placement import REGULAR_PLACEMENTS
from ..planner.plan import KernelSpec, ModelShape, PatternSpec, make_plan
from ..runtime.attention import PlannedAttention
from ..runtime.comm import Channel, Channels, Message
from ..runtime.measure import Recorder, collect_timeline
from ..runtime.mesh import Mesh, join, leave
from .common import RESULTS, write_result
from .masks import slash_mask

LAYOUTS = ["gather:chunks=1", "gather:chunks=2", "ring:prefetch=1", "ring:prefetch=3"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; its text is the row's `layout`."""

    placement: str
    granularity_blocks: int
    backend: str
    layout: str

    def __str__(self) -> str:
        return f"{self.placement}x{self.granularity_blocks} {self.layout}"


@dataclass(kw_only=True)
class _Sent:
    started: Any = None
    ended: Any = None

    def wait(self) -> None:
        """Nothing was sent."""


class SilentChannel:
    """Takes messages and sends nothing: what is left is compute."""

    def post(self, messages: Sequence[Message]) -> _Sent:
        """Drop the messages."""
        return _Sent()

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Milliseconds of one configuration on the slowest rank, medians over repeats; peak bytes of the fullest rank."""

    forward_ms: float
    backward_ms: float
    peak_bytes: int


def main() -> None:
    """Start the ranks, or be one."""
    arguments = _parser().parse_args()
    if "RANK" not in os.environ:
        raise SystemExit(_start(arguments))
    mesh = join(timeout_s=300)
    try:
        rows = _measure_all(arguments, mesh)
        if mesh.rank == 0:
            print(_table(rows))
            print(write_result("ring", rows, folder=arguments.results, gpus=arguments.gpus))
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--two-nodes", action="store_true", help="NCCL sees two nodes: sockets between the halves")
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.02], help="asked of the mask's slashes")
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--layout", action="append", help="name:parameter=value,…; forward+backward may differ: a/b")
    parser.add_argument("--placement", nargs="+", default=["striped"], choices=sorted(REGULAR_PLACEMENTS))
    parser.add_argument("--granularity-blocks", type=int, nargs="+", default=[1], help="blocks of one stripe")
    parser.add_argument("--backend", nargs="+", default=["triton"])
    parser.add_argument("--torch-context-parallel", action="store_true", help="also the dense ring of torch (slow)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="folder for one timeline per configuration")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _start(arguments: argparse.Namespace) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    half = max(arguments.gpus // 2, 1)
    ranks = []
    for rank in range(arguments.gpus):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.gpus, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}
        if arguments.two_nodes:
            environment["NCCL_HOSTID"] = f"node{rank // half}"
        ranks.append(
            subprocess.Popen([sys.executable, "-m", "sparsering.benchmarks.ring", *sys.argv[1:]], env=environment)
        )
    return max(rank.wait() for rank in ranks)


def _measure_all(arguments: argparse.Namespace, mesh: Mesh) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    channels = Channels(mesh)
    for density in arguments.density:
        mask = slash_mask(arguments.seq_len, density, arguments.columns, seed=arguments.seed).to(mesh.device)
        cases = product(
            arguments.placement, arguments.granularity_blocks, arguments.backend, arguments.layout or LAYOUTS
        )
        for placement, granularity, backend, layout in cases:
            case = Case(placement=placement, granularity_blocks=granularity, backend=backend, layout=layout)
            rows.append(_measure_planned(arguments, mesh, channels, mask, case))
            if mesh.rank == 0:
                print(_table(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.torch_context_parallel:
        rows.append(_measure_torch(arguments, mesh))
    return rows


def _measure_planned(
    arguments: argparse.Namespace, mesh: Mesh, channels: Channels, mask: AttentionMask, case: Case
) -> dict[str, Any]:
    forward, _, backward = case.layout.partition("/")
    granularity = case.granularity_blocks * mask.block_size
    plan = make_plan(
        model=ModelShape(layers=1, heads=16, kv_heads=2, head_dim=128),
        seq_len_tokens=arguments.seq_len,
        block_size=mask.block_size,
        dtype="bfloat16",
        columns_capacity=mask.column_capacity,
        placement=REGULAR_PLACEMENTS[case.placement](
            seq_len_tokens=arguments.seq_len, world_size=mesh.world_size, granularity_tokens=granularity
        ),
        forward=_parse_layout(forward),
        backward=_parse_layout(backward or forward),
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec(backend=case.backend),  # pyright: ignore[reportArgumentType]  # pydantic refuses others
    )
    planned = PlannedAttention(plan, mesh, channels=channels)
    tensors = _tensors(planned, arguments.seed)
    attend = _attend(planned, mask)
    whole = _time(attend, tensors, mesh, arguments.repeats)
    imbalance = _imbalance(planned, tensors, arguments, str(case), mask)
    silent: Channel = SilentChannel()
    planned.channels = dict.fromkeys(planned.channels, silent)
    alone = _time(attend, tensors, mesh, arguments.repeats)
    density = _density(mask)
    return _row(arguments, mesh, f"ours-{case.backend}", str(case), density, whole) | {
        "compute_ms": alone.forward_ms + alone.backward_ms,
        "exposed_ms": whole.forward_ms + whole.backward_ms - alone.forward_ms - alone.backward_ms,
        "compute_forward_ms": alone.forward_ms,
        "compute_backward_ms": alone.backward_ms,
        "imbalance": imbalance,
        "plan_digest": plan.digest,
    }


def _row(
    arguments: argparse.Namespace, mesh: Mesh, impl: str, layout: str, density: float, figures: Figures
) -> dict[str, Any]:
    return {
        "impl": impl,
        "layout": layout,
        "transport": "p2p",
        "world_size": mesh.world_size,
        "nodes": 2 if arguments.two_nodes else 1,
        "seq_len": arguments.seq_len,
        "heads": 16,
        "kv_heads": 2,
        "head_dim": 128,
        "dtype": "bfloat16",
        "density": density,
        "columns": arguments.columns,
        "seed": arguments.seed,
        "forward_ms": figures.forward_ms,
        "backward_ms": figures.backward_ms,
        "peak_bytes": figures.peak_bytes,
    }


def _parse_layout(text: str) -> tuple[str, dict[str, int]]:
    name, _, parameters = text.partition(":")
    pairs = (pair.split("=") for pair in parameters.split(",") if pair)
    return name, {key: int(value) for key, value in pairs}


def _tensors(planned: PlannedAttention, seed: int) -> list[Tensor]:
    """Return this rank's q, k, v (requiring gradients) and grad_out."""
    generator = torch.Generator(planned.mesh.device).manual_seed(seed + planned.mesh.rank)
    model, tokens = planned.plan.model, planned.positions[0].numel()
    shapes = [(model.heads, True), (model.kv_heads, True), (model.kv_heads, True), (model.heads, False)]
    return [
        torch.randn(1, tokens, heads, model.head_dim, generator=generator, device=planned.mesh.device)
        .to(planned.dtype)
        .requires_grad_(gradient)
        for heads, gradient in shapes
    ]


def _attend(planned: PlannedAttention, mask: AttentionMask) -> Callable[..., Tensor]:
    return lambda q, k, v: planned(q, k, v, mask)


def _time(attend: Callable[..., Tensor], tensors: list[Tensor], mesh: Mesh, repeats: int) -> Figures:
    """Return the slowest rank's medians after two warm-ups; ranks start every direction together."""
    *inputs, grad_out = tensors
    torch.cuda.reset_peak_memory_stats()
    samples: list[tuple[float, float]] = []
    for _ in range(repeats + 2):
        for tensor in inputs:
            tensor.grad = None
        forward, out = _timed(lambda: attend(*inputs))
        backward, _ = _timed(lambda out=out: out.backward(grad_out))
        samples.append((forward, backward))
        del out
    medians = [statistics.median(column) for column in zip(*samples[2:], strict=True)]
    worst = torch.tensor([*medians, float(torch.cuda.max_memory_allocated())], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    forward, backward, peak = worst.tolist()
    return Figures(forward_ms=forward, backward_ms=backward, peak_bytes=int(peak))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    torch.cuda.synchronize()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    result = work()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended), result


def _imbalance(
    planned: PlannedAttention, tensors: list[Tensor], arguments: argparse.Namespace, layout: str, mask: AttentionMask
) -> float:
    """Return the worker imbalance of one recorded step; with --profile its timeline is written too."""
    q, k, v, grad_out = tensors
    mesh = planned.mesh
    timed = PlannedAttention(
        planned.plan, mesh, channels=Channels(mesh, timed=True), recorder=Recorder(device=mesh.device)
    )
    assert timed.recorder is not None
    for _ in range(2):
        dist.barrier()
        torch.cuda.synchronize()
        timed.recorder.begin()
        timed(q, k, v, mask).backward(grad_out)
    spans = timed.recorder.spans(mesh.rank)
    busy = sum(span.duration_us for span in spans if span.stream == "compute")
    everyone = [torch.zeros(1, device=mesh.device) for _ in range(mesh.world_size)]
    dist.all_gather(everyone, torch.tensor([busy], device=mesh.device))
    if arguments.profile is not None:
        timeline = collect_timeline(mesh, spans, topic=f"profile/{timed.topic}", metadata={"layout": layout})
        if timeline is not None:
            name = layout.translate(str.maketrans("/:=, ", "-----"))
            timeline.save(arguments.profile / f"ring-{name}-{_density(mask):.3f}.json.gz")
    totals = [float(value) for value in everyone]
    return max(totals) / (sum(totals) / len(totals))


def _density(mask: AttentionMask) -> float:
    blocks = mask.blocks
    counts = blocks - torch.arange(blocks, device=mask.active.device)
    return float((mask.active * counts).sum() / (mask.heads * blocks * (blocks + 1) / 2))


def _measure_torch(arguments: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """torch's dense ring: FlashAttention-2, 16 K/V heads (it takes no grouped queries)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    group = init_device_mesh("cuda", (mesh.world_size,))
    generator = torch.Generator(mesh.device).manual_seed(arguments.seed)
    tokens = arguments.seq_len // mesh.world_size
    tensors = [
        torch.randn(1, 16, tokens, 128, generator=generator, device=mesh.device, dtype=torch.bfloat16) for _ in range(4)
    ]
    for tensor in tensors[:3]:
        tensor.requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), context_parallel(group):
        figures = _time(attend, tensors, mesh, 1)
    return _row(arguments, mesh, "torch-context-parallel", "ring", 1.0, figures) | {"kv_heads": 16, "columns": 0}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'impl':24}{'layout':44}{'density':>8}{'forward':>9}{'backward':>9}{'alone':>8}{'ratio':>7}{'imbal.':>7}"
    ]
    for row in rows:
        total, alone = row["forward_ms"] + row["backward_ms"], row.get("compute_ms", float("nan"))
        lines.append(
            f"{row['impl']:24}{row['layout']:44}{row['density']:8.3f}{row['forward_ms']:9.2f}{row['backward_ms']:9.2f}"
            f"{alone:8.2f}{total / alone:7.3f}{row.get('imbalance', float('nan')):7.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
