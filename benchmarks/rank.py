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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..kernels.mask import AttentionMask
from ..planner.plan import Plan
from ..planner.schedule.schedule import DIRECTIONS
from ..runtime.attention.bound import bind
from ..runtime.attention.planned import PlannedAttention
from ..runtime.comm.channels import Channel, Channels
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import free_port, rank_environment, start_ranks
from ..traces.errors import InputError
from .lib import ring_plans
from .lib.common import ResultFile
from .lib.masks import density_of
from .lib.rank_channels import EchoStore, NoiseChannels, PairChannels, require_pair
from .lib.ring_options import ring_parser
from .lib.ring_plans import Work
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
        os.environ |= rank_environment(0, 1, free_port())
    elif "RANK" not in os.environ:
        module = "sparsering.benchmarks.rank"
        raise SystemExit(start_ranks(sys.argv[1:], world_size=2, environment=os.environ, module=module))
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
    parser = ring_parser(__doc__)
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


def _measure_family(
    arguments: argparse.Namespace, mesh: Mesh, family: str, groups: Sequence[tuple[int, ...]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of all ranks asked for, plan by plan."""
    cluster = ring_plans.cluster_of(arguments.cluster, world_size=arguments.world_size, nodes=1)
    model = ring_plans.model_of(arguments.heads, toy=arguments.toy)
    channels: Channels = NoiseChannels(mesh) if arguments.gpus == 1 else PairChannels(mesh)
    for density in arguments.density:
        work = ring_plans.make_work(
            family, seq_len=arguments.seq_len, density=density, columns=arguments.columns, seed=arguments.seed,
            heads=model.heads,
        )  # fmt: skip
        cases = ring_plans.make_cases(
            placements=arguments.placement,
            granularities_blocks=[1],
            backends=arguments.backends,
            layouts=arguments.layout,
        )
        for case in cases:
            dtype = "float32" if arguments.toy else "bfloat16"
            plan = ring_plans.make_case_plan(
                case, work, cluster=cluster, leave_out=not arguments.keep_all_pairs, model=model, dtype=dtype,
                narrow_gradients=arguments.narrow_gradients,
            )  # fmt: skip
            for pair in groups if arguments.gpus == 2 else ():
                for way in DIRECTIONS:
                    require_pair(plan.schedule(way), (pair[0], pair[1]))
            measured = [_measure(arguments, mesh, channels, plan, work, ranks) for ranks in groups]
            predicted = ring_plans.predicted_times(plan, work, cluster) if mesh.rank == 0 else {}
            if mesh.rank == 0:
                print(_slowest(work, plan, measured), flush=True)
            yield [row | {"placement": case.placement} | predicted for row in measured]


def _slowest(work: Work, plan: Plan, measured: Sequence[dict[str, Any]]) -> str:
    row = max(measured, key=lambda row: row["step_ms"])
    text = (
        f"{work.family} {density_of(work.mask):.3f} {ring_plans.name_of(plan)} {plan.kernels.backend}: slowest "
        f"{'rank' if 'rank' in row else 'ranks'} {row.get('rank', row.get('ranks'))} "
        f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f} ms, in one go {row['step_ms']:.2f} ms"
    )
    if "compute_step_ms" not in row:
        return text
    peak = "" if row["peak_ratio"] is None else f", memory {row['peak_ratio']:.3f} of the plan's"
    return f"{text}, kernels alone {row['compute_step_ms']:.2f} ms{peak}"


def _measure(
    arguments: argparse.Namespace,
    mesh: Mesh,
    channels: Channels,
    plan: Plan,
    work: Work,
    ranks: tuple[int, ...],
) -> dict[str, Any]:
    """Measure one rank alone, or two of which this process is one: the figures are those of the slower."""
    rank = ranks[mesh.rank]
    one_of_many = replace(mesh, rank=rank, world_size=plan.placement.world_size, store=EchoStore())  # pyright: ignore[reportArgumentType]
    before = allocated_bytes(mesh)
    mask = work.mask.to(mesh.device)
    bound = bind(plan, one_of_many)
    planned = PlannedAttention(bound, channels=channels)
    tensors = random_tensors(plan.model, bound.own_positions.numel(), one_of_many, arguments.seed, bound.dtype)
    attend = partial(_attend, planned, mask)
    figures = time_steps(attend, tensors, mesh, arguments.repeats, before)
    if arguments.kernels and mesh.device.type == "cuda":
        _print_kernels(planned, tensors, mask, aloud=mesh.rank == 0)
    row = {
        "impl": f"ours-{plan.kernels.backend}",
        "mask": work.family,
        "density": density_of(work.mask),
        "columns": work.columns,
        "layout": ring_plans.name_of(plan),
        "transport": ring_plans.transports_of(plan),
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
    predicted = ring_plans.predicted_peak_bytes(plan)
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
