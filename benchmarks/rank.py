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
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..kernels.mask import AttentionMask
from ..planner.plan import Plan
from ..planner.schedule.schedule import DIRECTIONS
from ..runtime.attention.planned import PlannedAttention
from ..runtime.comm.channels import Channel, Channels
from ..runtime.comm.mesh import Mesh, join, leave
from ..traces.errors import InputError
from .lib.common import RESULTS, ResultFile
from .lib.masks import density_of
from .lib.rank_channels import EchoStore, NoiseChannels, PairChannels, require_pair
from .lib.ranks import start_ranks
from .lib.ring_plans import (
    FAMILIES,
    MODEL,
    PLACEMENTS,
    Work,
    cluster_of,
    make_case_plan,
    make_cases,
    make_work,
    model_of,
    name_of,
    predicted_peak_bytes,
    predicted_times,
    transports_of,
)
from .lib.ring_rows import random_tensors
from .lib.ring_timing import Figures, SilentChannel, allocated_bytes, time_steps

TOP_KERNELS = 16


def main() -> None:
    """Measure every rank asked for, of every plan."""
    arguments = _parser().parse_args()
    if arguments.repeats < 1:
        raise SystemExit(f"rank: --repeats {arguments.repeats}: at least 1")
    if arguments.toy:
        arguments.gpus, arguments.world_size, arguments.seq_len, arguments.columns = 2, 4, 2048, 64
        arguments.backends, arguments.cluster = ["blockwise"], "local-cpu-4"
    elif not torch.cuda.is_available():
        raise SystemExit("rank: needs a GPU; --toy does not")
    groups = _groups(arguments)
    if arguments.gpus == 1:
        os.environ |= _alone()
    elif "RANK" not in os.environ:
        raise SystemExit(start_ranks("sparsering.benchmarks.rank", sys.argv[1:], count=2, shared={}))
    mesh = join(device="cpu" if arguments.toy else None, timeout_s=300)
    try:
        result = ResultFile("rank", folder=arguments.results, gpus=arguments.gpus)
        rows: list[dict[str, Any]] = []
        for measured in (
            step for family in arguments.family for step in _measure_family(arguments, mesh, family, groups)
        ):
            rows += measured
            if mesh.rank == 0:
                result.write(rows, finished=False)
        if mesh.rank == 0:
            result.write(rows, finished=True)
            print(result.path)
    except InputError as error:
        if mesh.rank == 0:
            print(f"rank: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, choices=[1, 2], help="2: two ranks at a time, with transfers")
    parser.add_argument("--world-size", type=int, default=8, help="ranks of the plan")
    parser.add_argument("--ranks", type=int, nargs="+", help="of them to measure; default all")
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--heads", type=int, nargs=2, default=[MODEL.heads, MODEL.kv_heads], metavar=("QUERY", "KV"))
    parser.add_argument("--family", nargs="+", default=["slash"], choices=FAMILIES, help="kinds of masks")
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.02], help="asked of the mask")
    parser.add_argument("--columns", type=int, default=1024, help="of slash masks; others have none")
    parser.add_argument("--layout", nargs="+", default=["gather:chunks=1"], help="name:parameter=value,…")
    parser.add_argument("--placement", nargs="+", default=["striped"], choices=PLACEMENTS)
    parser.add_argument(
        "--narrow-gradients", action="store_true", help="planned: the planner may round dK/dV of others"
    )
    parser.add_argument("--keep-all-pairs", action="store_true", help="compute and send what a mask never needs, too")
    parser.add_argument("--cluster", default="h200-nvlink-8", help="for planned, and for predicted times")
    parser.add_argument("--backends", nargs="+", default=["triton"], help="triton flash4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", action="store_true", help=f"list the {TOP_KERNELS} kernels that take most time")
    parser.add_argument(
        "--toy", action="store_true", help="two gloo processes, 4 ranks, 2,048 tokens, blockwise: to try the road"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _alone() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _groups(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """Return the ranks asked for, as many at a time as there are GPUs."""
    ranks = arguments.ranks or list(range(arguments.world_size))
    if not all(0 <= rank < arguments.world_size for rank in ranks):
        raise SystemExit(f"rank: --ranks {ranks}: ranks are 0 to {arguments.world_size - 1}")
    if len(ranks) % arguments.gpus or len(set(ranks)) < len(ranks):
        raise SystemExit(f"rank: --ranks {ranks}: not {'pairs of ranks' if arguments.gpus > 1 else 'ranks'}, each once")
    return [tuple(ranks[first : first + arguments.gpus]) for first in range(0, len(ranks), arguments.gpus)]


def _measure_family(
    arguments: argparse.Namespace, mesh: Mesh, family: str, groups: Sequence[tuple[int, ...]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of all ranks asked for, plan by plan."""
    cluster = cluster_of(arguments.cluster, world_size=arguments.world_size, nodes=1)
    model = model_of(arguments.heads, toy=arguments.toy)
    channels: Channels = NoiseChannels(mesh) if arguments.gpus == 1 else PairChannels(mesh)
    for density in arguments.density:
        work = make_work(
            family, seq_len=arguments.seq_len, density=density, columns=arguments.columns, seed=arguments.seed,
            heads=model.heads,
        )  # fmt: skip
        cases = make_cases(
            placements=arguments.placement,
            granularities_blocks=[1],
            backends=arguments.backends,
            layouts=arguments.layout,
        )
        for case in cases:
            dtype = "float32" if arguments.toy else "bfloat16"
            plan = make_case_plan(
                case, work, cluster=cluster, leave_out=not arguments.keep_all_pairs, model=model, dtype=dtype,
                narrow_gradients=arguments.narrow_gradients,
            )  # fmt: skip
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
    mask = work.mask.to(mesh.device)
    planned = PlannedAttention(plan, one_of_many, channels=channels)
    tensors = random_tensors(plan.model, planned.positions[0].numel(), one_of_many, arguments.seed, planned.dtype)
    attend = partial(_attend, planned, mask)
    figures = time_steps(attend, tensors, mesh, arguments.repeats, before)
    if arguments.kernels and mesh.device.type == "cuda":
        _print_kernels(planned, tensors, mask, aloud=mesh.rank == 0)
    row = {
        "impl": f"ours-{plan.kernels.backend}",
        "mask": work.family,
        "density": density_of(work.mask),
        "columns": work.columns,
        "layout": name_of(plan),
        "transport": transports_of(plan),
        "world_size": plan.placement.world_size,
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
    if len(ranks) == 1:
        return row | {"rank": rank}
    silent: Channel = SilentChannel()
    planned.channels = dict.fromkeys(planned.channels, silent)
    alone = time_steps(attend, tensors, mesh, arguments.repeats, before)
    return row | {"ranks": list(ranks), "compute_step_ms": alone.step_ms} | _memory(plan, planned, figures)


def _attend(planned: PlannedAttention, mask: AttentionMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return planned(q, k, v, mask)


def _memory(plan: Plan, planned: PlannedAttention, figures: Figures) -> dict[str, Any]:
    predicted = predicted_peak_bytes(plan)
    peak = None if figures.peak_bytes is None else figures.peak_bytes + planned.pool.uncounted_bytes
    return {
        "peak_bytes": peak,
        "predicted_peak_bytes": predicted,
        "peak_ratio": None if peak is None else peak / predicted,
    }


def _print_kernels(planned: PlannedAttention, tensors: list[Tensor], mask: AttentionMask, *, aloud: bool) -> None:
    q, k, v, grad_out = tensors
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        planned(q, k, v, mask).backward(grad_out)
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
