"""Short layers in a row, as a training step has them: kernel by kernel, as CUDA graphs, and a dense ring's.

    python -m sparsering.benchmarks.layers --gpus 2                        # a small model's: 9 and 3 heads of 64, 64K
    python -m sparsering.benchmarks.layers --gpus 2 --heads 16 2 --head-dim 128 --family slash xattention moba
    python -m sparsering.benchmarks.layers --toy                           # two gloo processes on CPUs, to try the road

One process group, one run; masks are replayed. `forward_ms` and `backward_ms` are what a layer takes of --layers that
follow one another without a wait: the time of the device, or of the host where that is longer. `host_forward_ms` and
`host_backward_ms` are the time that the launching thread computes for a layer. All of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..planner.plan import Plan
from ..runtime.attention.bound import bind
from ..runtime.attention.graphs.setting import graphs_for
from ..runtime.attention.graphs.words import GraphsSetting
from ..runtime.attention.planned import PlannedAttention
from ..runtime.baselines.ring import ZigzagAttention
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import start_ranks
from .lib.common import ResultFile
from .lib.masks import density_of
from .lib.ring_options import cases, parsed, planned_case, ring_parser, works
from .lib.ring_plans import Work, cluster_of, name_of
from .lib.ring_rows import make_row, random_tensors
from .lib.ring_timing import Figures

WARMUPS = 2
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Start the ranks, or be one."""
    arguments = parsed(_parser())
    arguments.layout = arguments.layout or ["gather:chunks=1"]
    arguments.gpus = min(arguments.gpus, 2) if arguments.toy else arguments.gpus
    if "RANK" not in os.environ:
        module = "sparsering.benchmarks.layers"
        raise SystemExit(start_ranks(sys.argv[1:], world_size=arguments.gpus, environment=os.environ, module=module))
    mesh = join(device="cpu" if arguments.toy else None, timeout_s=300)
    arguments.world_size, arguments.nodes = mesh.world_size, 1
    try:
        result = ResultFile("layers", folder=arguments.results, gpus=arguments.gpus)
        result.write_as_they_come(_measure_all(arguments, mesh), _line, first_rank=mesh.rank == 0)
        if mesh.rank == 0:
            print(result.path)
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = ring_parser(__doc__)
    parser.set_defaults(seq_len=65536, heads=[9, 3], head_dim=64, family=["xattention"], density=[0.1])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--layout", action="append", help="name:parameter=value,…")
    parser.add_argument("--granularity-blocks", type=int, nargs="+", default=[1], help="blocks of one unit")
    parser.add_argument("--no-dense", action="store_true", help="without the dense ring, which takes longest")
    return parser


def _measure_all(arguments: argparse.Namespace, mesh: Mesh) -> Iterator[dict[str, Any]]:
    cluster = cluster_of(arguments.cluster, world_size=mesh.world_size, nodes=1)
    settings: tuple[GraphsSetting, ...] = ("never",) if arguments.toy else ("never", "always")
    number = 0
    for work in works(arguments):
        for case in cases(arguments):
            made = planned_case(arguments, case, work, cluster).model_dump(mode="json") if mesh.rank == 0 else None
            plan = Plan.model_validate(mesh.broadcast(f"benchmark plan {number}", made))
            number += 1
            for setting in settings:
                yield _planned(arguments, mesh, plan, work, setting)
    if not arguments.no_dense:
        attend = ZigzagAttention(mesh)
        yield _row(
            arguments, f"dense-zigzag-{attend.kernel}", "zigzag ring", _timed(arguments, mesh, attend, bound=None)
        )


def _planned(
    arguments: argparse.Namespace, mesh: Mesh, plan: Plan, work: Work, setting: GraphsSetting
) -> dict[str, Any]:
    bound = bind(plan, mesh)
    mask = work.mask.to(mesh.device)
    planned = PlannedAttention(bound, graphs=graphs_for(bound, setting))
    times = _timed(arguments, mesh, lambda q, k, v: planned(q, k, v, mask), bound=planned)
    impl = {"never": "launched", "always": "cuda-graphs", "auto": "auto"}[setting]
    row = _row(arguments, f"ours-{impl}", name_of(plan), times)
    return row | {
        "mask": work.family,
        "density": density_of(work.mask),
        "columns": work.columns,
        "plan_digest": plan.digest,
    }


def _timed(
    arguments: argparse.Namespace, mesh: Mesh, attend: Attend, *, bound: PlannedAttention | None
) -> dict[str, float]:
    tokens = arguments.seq_len // mesh.world_size if bound is None else bound.bound.own_positions.numel()
    layers = [
        random_tensors(arguments.model, tokens, mesh, arguments.seed + layer, getattr(torch, arguments.dtype))
        for layer in range(arguments.layers)
    ]
    found = [_step(mesh, attend, layers) for _ in range(WARMUPS + arguments.repeats)][WARMUPS:]
    medians = {name: statistics.median(step[name] for step in found) / len(layers) for name in found[0]}
    worst = torch.tensor(list(medians.values()), dtype=torch.float64, device=mesh.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(medians, worst.tolist(), strict=True))


def _step(mesh: Mesh, attend: Attend, layers: list[list[Tensor]]) -> dict[str, float]:
    """Milliseconds of all layers, forward and then backward, each from a standstill of all ranks."""
    outs: list[Tensor] = []

    def forward() -> None:
        outs.extend(attend(q, k, v) for q, k, v, _ in layers)

    def backward() -> None:
        for out, (*inputs, grad_out) in zip(reversed(outs), reversed(layers), strict=True):
            torch.autograd.grad(out, inputs, grad_out)

    times: dict[str, float] = {}
    for name, work in (("forward", forward), ("backward", backward)):
        _stand_still(mesh)
        began, host = time.perf_counter(), _host_seconds()
        work()
        times[f"host_{name}_ms"] = 1e3 * (_host_seconds() - host)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        times[f"{name}_ms"] = 1e3 * (time.perf_counter() - began)
    return times


def _host_seconds() -> float:
    """CPU time of the threads that launch: this one, and in backward autograd's own.

    Of the whole process, so that NCCL's and other threads, which mostly sleep, count too.
    """
    return time.process_time()


def _stand_still(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()


def _row(arguments: argparse.Namespace, impl: str, layout: str, times: dict[str, float]) -> dict[str, Any]:
    figures = Figures(
        forward_ms=times["forward_ms"], backward_ms=times["backward_ms"],
        step_ms=times["forward_ms"] + times["backward_ms"], peak_bytes=None,
    )  # fmt: skip
    return make_row(arguments, impl, layout, figures) | {"layers": arguments.layers, **times}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['impl']:24}{row['mask']:12}{row['density']:8.4f}  forward {row['forward_ms']:7.3f}  backward "
        f"{row['backward_ms']:7.3f} ms  host {row['host_forward_ms']:6.3f} {row['host_backward_ms']:6.3f} ms"
    )


if __name__ == "__main__":
    main()
