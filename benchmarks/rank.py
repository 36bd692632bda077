"""Ranks of a planned ring on one or two GPUs, whatever world size the plan is for.

    python -m sparsering.benchmarks.rank --world-size 8 --seq-len 524288 --ranks 0 7
    python -m sparsering.benchmarks.rank --world-size 8 --seq-len 524288 --backends triton flash4 --kernels
    python -m sparsering.benchmarks.rank --world-size 8 --seq-len 524288 --gpus 2 --ranks 7 6
    python -m sparsering.benchmarks.rank --toy            # two gloo processes on CPUs, to try the road

On one GPU a rank's kernels alone: the schedule is played with channels that send nothing; what others would send is
random numbers, copied in on a side stream. No ring of that plan is much quicker than forward + backward of its slowest
rank here. On two GPUs two ranks at a time, in the order of --ranks, each the other's peers: all that a rank sends to
any other goes to the second GPU, all that it receives comes from there, in the sizes, groups and phases of the plan.
Sums over all ranks are sums over two, and nobody waits for more than one other: what eight make of it, only real rings
(benchmarks/ring.py) say. Rows then have `compute_step_ms`, the same with channels that do nothing, and memory beside
the plan's prediction. `--kernels` lists what takes the time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..planner.plan import Plan
from ..planner.schedule.schedule import DIRECTIONS
from ..runtime.comm.channels import Channels
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import free_port, rank_environment, start_ranks
from ..traces.errors import InputError
from .lib.common import ResultFile
from .lib.masks import density_of
from .lib.rank_channels import EchoStore, NoiseChannels, PairChannels, require_pair
from .lib.ring_options import cases, parsed, planned_case, ring_parser, works
from .lib.ring_plans import Work, cluster_of, name_of, predicted_times
from .lib.ring_rows import PlannedLayer
from .lib.ring_timing import allocated_bytes

TOP_KERNELS = 16


def main() -> None:
    """Measure every rank asked for, of every plan."""
    arguments = parsed(_parser())
    if arguments.repeats < 1:
        raise SystemExit(f"rank: --repeats {arguments.repeats}: at least 1")
    if arguments.toy:
        arguments.gpus, arguments.world_size = 2, 4
    elif not torch.cuda.is_available():
        raise SystemExit("rank: needs a GPU; --toy does not")
    groups = _groups(arguments)
    if arguments.gpus == 1:
        os.environ |= rank_environment(0, 1, free_port())
    elif "RANK" not in os.environ:
        module = "sparsering.benchmarks.rank"
        raise SystemExit(start_ranks(sys.argv[1:], world_size=2, environment=os.environ, module=module))
    mesh = join(device="cpu" if arguments.toy else None, timeout_s=300)
    try:
        result = ResultFile("rank", folder=arguments.results, gpus=arguments.gpus)
        rows: list[dict[str, Any]] = []
        for measured in _measure_all(arguments, mesh, groups):
            rows += measured
            if mesh.rank == 0:
                result.write(rows, finished=False)
        if mesh.rank == 0:
            print(result.write(rows))
    except InputError as error:
        if mesh.rank == 0:
            print(f"rank: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = ring_parser(__doc__)
    parser.set_defaults(granularity_blocks=[1])
    parser.add_argument("--gpus", type=int, default=1, choices=[1, 2], help="2: two ranks at a time, with transfers")
    parser.add_argument("--world-size", type=int, default=8, help="ranks of the plan")
    parser.add_argument("--ranks", type=int, nargs="+", help="of them to measure; default all")
    parser.add_argument("--layout", nargs="+", default=["gather:chunks=1"], help="name:parameter=value,…")
    parser.add_argument("--kernels", action="store_true", help=f"list the {TOP_KERNELS} kernels that take most time")
    return parser


def _groups(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """Return the ranks asked for, as many at a time as there are GPUs."""
    ranks = arguments.ranks or list(range(arguments.world_size))
    if not all(0 <= rank < arguments.world_size for rank in ranks):
        raise SystemExit(f"rank: --ranks {ranks}: ranks are 0 to {arguments.world_size - 1}")
    if len(ranks) % arguments.gpus or len(set(ranks)) < len(ranks):
        raise SystemExit(f"rank: --ranks {ranks}: not {'pairs of ranks' if arguments.gpus > 1 else 'ranks'}, each once")
    return [tuple(ranks[first : first + arguments.gpus]) for first in range(0, len(ranks), arguments.gpus)]


def _measure_all(
    arguments: argparse.Namespace, mesh: Mesh, groups: Sequence[tuple[int, ...]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of all ranks asked for, plan by plan."""
    cluster = cluster_of(arguments.cluster, world_size=arguments.world_size, nodes=1)
    channels: Channels = NoiseChannels(mesh) if arguments.gpus == 1 else PairChannels(mesh)
    for work in works(arguments):
        for case in cases(arguments):
            plan = planned_case(arguments, case, work, cluster)
            for pair in groups if arguments.gpus == 2 else ():
                for way in DIRECTIONS:
                    require_pair(plan.schedule(way), (pair[0], pair[1]))
            measured = [_measure(arguments, mesh, channels, plan, work, ranks) for ranks in groups]
            predicted = predicted_times(plan, work, cluster) if mesh.rank == 0 else {}
            if mesh.rank == 0:
                print(_slowest(work, plan, measured), flush=True)
            yield [row | {"placement": case.placement} | predicted for row in measured]


def _slowest(work: Work, plan: Plan, measured: Sequence[dict[str, Any]]) -> str:
    row = max(measured, key=lambda row: row["step_ms"])
    text = (
        f"{work.family} {density_of(work.mask):.3f} {name_of(plan)} {plan.kernels.backend}: slowest "
        f"{'rank' if 'rank' in row else 'ranks'} {row.get('rank', row.get('ranks'))} "
        f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f} ms, in one go {row['step_ms']:.2f} ms"
    )
    if "compute_step_ms" not in row:
        return text
    peak = "" if row["peak_ratio"] is None else f", memory {row['peak_ratio']:.3f} of the plan's"
    return f"{text}, kernels alone {row['compute_step_ms']:.2f} ms{peak}"


def _measure(
    arguments: argparse.Namespace, mesh: Mesh, channels: Channels, plan: Plan, work: Work, ranks: tuple[int, ...]
) -> dict[str, Any]:
    """Measure one rank alone, or two of which this process is one: the figures are those of the slower."""
    rank = ranks[mesh.rank]
    one_of_many = replace(mesh, rank=rank, world_size=plan.placement.world_size, store=EchoStore())  # pyright: ignore[reportArgumentType]
    before = allocated_bytes(mesh)
    layer = PlannedLayer(arguments, plan, work.mask.to(mesh.device), one_of_many, channels, before)
    figures = layer.time()
    if arguments.kernels and mesh.device.type == "cuda":
        _print_kernels(layer, aloud=mesh.rank == 0)
    row = layer.row(arguments, work, figures)
    if len(ranks) == 1:
        return row | {"rank": rank}
    alone = layer.time_alone()
    return row | {"ranks": list(ranks), "compute_step_ms": alone.step_ms} | layer.memory(figures)


def _print_kernels(layer: PlannedLayer, *, aloud: bool) -> None:
    q, k, v, grad_out = layer.tensors
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        layer.planned(q, k, v, layer.mask).backward(grad_out)
        torch.cuda.synchronize()
    if not aloud:
        return
    kernels = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    print(f"  all kernels {total / 1e3:.2f} ms")
    for event in kernels[:TOP_KERNELS]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:4d}  {event.key[:110]}")


if __name__ == "__main__":
    main()
