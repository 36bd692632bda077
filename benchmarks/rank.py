"""One rank of a planned ring on one GPU: its kernels, whatever world size the plan is for.

    python -m sparsering.benchmarks.rank --world-size 8 --seq-len 524288 --ranks 0 7
    python -m sparsering.benchmarks.rank --world-size 8 --seq-len 524288 --backends triton flash4 --kernels

Plays the schedule with channels that send nothing: what others would send is random numbers, copied in on a side
stream. No ring of that plan is much quicker than forward + backward of its slowest rank here; how much slower it is,
only real rings (benchmarks/ring.py) say. `--kernels` lists what takes the time.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..planner.plan import Plan
from ..planner.schedule import Schedule
from ..runtime.attention import PlannedAttention
from ..runtime.comm import Channel, Channels, Message
from ..runtime.mesh import Mesh, join, leave
from .common import RESULTS, ResultFile
from .masks import density_of
from .ring_plans import FAMILIES, MODEL, Case, Work, cluster_of, make_case_plan, make_work, name_of
from .ring_rows import random_tensors
from .ring_timing import allocated_bytes, time_steps

TOP_KERNELS = 16


def main() -> None:
    """Measure every rank asked for, of every plan."""
    arguments = _parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("rank: needs a GPU")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= alone
    mesh = join(timeout_s=60)
    try:
        result = ResultFile("rank", folder=arguments.results, gpus=1)
        rows: list[dict[str, Any]] = []
        for measured in (ranks for family in arguments.family for ranks in _measure_family(arguments, mesh, family)):
            rows += measured
            result.write(rows, finished=False)
        result.write(rows, finished=True)
        print(result.path)
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=8, help="ranks of the plan")
    parser.add_argument("--ranks", type=int, nargs="+", help="of them to measure; default all")
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--family", nargs="+", default=["slash"], choices=FAMILIES, help="kinds of masks")
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.02], help="asked of the mask")
    parser.add_argument("--columns", type=int, default=1024, help="of slash masks; others have none")
    parser.add_argument("--layout", nargs="+", default=["gather:chunks=1"], help="name:parameter=value,…")
    parser.add_argument("--placement", nargs="+", default=["striped"])
    parser.add_argument("--cluster", default="h200-nvlink-8")
    parser.add_argument("--backends", nargs="+", default=["triton"], help="triton flash4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", action="store_true", help=f"list the {TOP_KERNELS} kernels that take most time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _measure_family(arguments: argparse.Namespace, mesh: Mesh, family: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of all ranks asked for, plan by plan."""
    cluster = cluster_of(arguments.cluster, world_size=arguments.world_size, nodes=1)
    for density in arguments.density:
        work = make_work(
            family, seq_len=arguments.seq_len, density=density, columns=arguments.columns, seed=arguments.seed
        )
        for placement, backend, layout in product(arguments.placement, arguments.backends, arguments.layout):
            case = Case(placement=placement, granularity_blocks=1, backend=backend, layout=layout)
            plan = make_case_plan(case, work, cluster=cluster)
            ranks = arguments.ranks or range(arguments.world_size)
            measured = [_measure_rank(arguments, mesh, plan, work, rank) for rank in ranks]
            slowest = max(measured, key=lambda row: row["step_ms"])
            print(
                f"{family} {density_of(work.mask):.3f} {name_of(plan)} {backend}: slowest rank {slowest['rank']} "
                f"{slowest['forward_ms']:.2f} + {slowest['backward_ms']:.2f} ms, in one go {slowest['step_ms']:.2f} ms",
                flush=True,
            )
            yield measured


def _measure_rank(arguments: argparse.Namespace, mesh: Mesh, plan: Plan, work: Work, rank: int) -> dict[str, Any]:
    alone = replace(mesh, rank=rank, world_size=plan.placement.world_size, store=_EchoStore())  # pyright: ignore[reportArgumentType]
    planned = PlannedAttention(plan, alone, channels=_NoiseChannels(alone))
    mask = work.mask.to(mesh.device)
    tensors = random_tensors(MODEL, planned.positions[0].numel(), alone, arguments.seed, planned.dtype)
    figures = time_steps(
        lambda q, k, v: planned(q, k, v, mask), tensors, mesh, arguments.repeats, allocated_bytes(mesh)
    )
    if arguments.kernels:
        _print_kernels(planned, tensors, mask)
    return {
        "impl": f"ours-{plan.kernels.backend}",
        "mask": work.family,
        "density": density_of(work.mask),
        "columns": work.columns,
        "layout": name_of(plan),
        "world_size": plan.placement.world_size,
        "rank": rank,
        "seq_len": plan.seq_len_tokens,
        "heads": plan.model.heads,
        "kv_heads": plan.model.kv_heads,
        "head_dim": plan.model.head_dim,
        "dtype": plan.dtype,
        "seed": arguments.seed,
        "forward_ms": figures.forward_ms,
        "backward_ms": figures.backward_ms,
        "step_ms": figures.step_ms,
        "plan_digest": plan.digest,
    }


def _print_kernels(planned: PlannedAttention, tensors: list[Tensor], mask: Any) -> None:
    q, k, v, grad_out = tensors
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        planned(q, k, v, mask).backward(grad_out)
        torch.cuda.synchronize()
    kernels = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    print(f"  all kernels {total / 1e3:.2f} ms")
    for event in kernels[:TOP_KERNELS]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:4d}  {event.key[:110]}")


class _EchoStore:
    """A store whose other ranks say whatever this one says."""

    def __init__(self) -> None:
        self._said: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._said[key.rpartition("/")[0]] = value.encode()

    def wait(self, keys: Sequence[str], timeout: Any) -> None:
        assert all(key.rpartition("/")[0] in self._said for key in keys)

    def get(self, key: str) -> bytes:
        return self._said[key.rpartition("/")[0]]


@dataclass(kw_only=True)
class _Copied:
    started: Any
    ended: Any

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.ended)


class _NoiseChannel:
    """Copies random numbers to where K/V would land; gradients and columns are left as they are."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._noise: dict[tuple[int, torch.dtype], Tensor] = {}

    def post(self, messages: Sequence[Message]) -> _Copied:
        """Start the copies behind the current stream's work so far."""
        targets = [m.tensor for m in messages if m.operation == "receive"]
        targets += [m.output for m in messages if m.operation == "all_gather" and m.output is not None]
        started, ended = torch.cuda.Event(), torch.cuda.Event()
        noise = [self._noise_like(target) for target in targets]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            started.record()
            for target, values in zip(targets, noise, strict=True):
                target.view(-1).copy_(values)
            ended.record()
        return _Copied(started=started, ended=ended)

    def close(self) -> None:
        """Wait for what was posted."""
        self._stream.synchronize()

    def _noise_like(self, target: Tensor) -> Tensor:
        key = target.numel(), target.dtype
        if key not in self._noise:
            values = torch.randn(target.numel(), device=target.device, dtype=target.dtype)
            self._noise[key] = values * (1.0 if target.dtype.itemsize == 2 else 0.0)
        return self._noise[key]


class _NoiseChannels(Channels):
    def bind(self, schedules: Sequence[Schedule]) -> dict[str, Channel]:
        channel = _NoiseChannel(self._mesh.device)
        return {communicator.name: channel for schedule in schedules for communicator in schedule.communicators}


if __name__ == "__main__":
    main()
