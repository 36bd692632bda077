"""Planned rings on the GPUs of one host: placements × layouts × masks × backends, beside dense rings.

    python -m sparsering.benchmarks.ring --gpus 8 --seq-len 524288 --density 0.05 0.02
    python -m sparsering.benchmarks.ring --gpus 8 --family xattention documents --placement striped planned
    python -m sparsering.benchmarks.ring --gpus 8 --two-nodes --layout hierarchical:inner_size=4 --layout ring
    python -m sparsering.benchmarks.ring --gpus 8 --backends triton flash4 --baselines torch-context-parallel
    python -m sparsering.benchmarks.ring --gpus 8 --baselines mtraining-hierarchical --mtraining FOLDER
    python -m sparsering.benchmarks.ring --toy            # two gloo processes on CPUs, to try the road

One process group, one run. `forward_ms` and `backward_ms` begin at a standstill each, `step_ms` is both in one go.
`compute_ms` (their sum) and `compute_step_ms` play the same schedule with channels that send nothing: the slowest
rank's kernels alone. `exposed_ms` is what forward and backward take beyond that. `peak_bytes` is what the layer adds to
the memory of the fullest GPU, its inputs included, beside `predicted_peak_bytes`, what the plan says.
`predicted_forward_ms` and `predicted_backward_ms` are the simulator's for --cluster.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..planner.cost.cluster import Cluster
from ..planner.plan import Plan
from ..runtime.attention.planned import PlannedAttention
from ..runtime.baselines.ring import ZigzagAttention
from ..runtime.baselines.torch_ring import TorchContextParallel
from ..runtime.comm.channels import Channels
from ..runtime.comm.measure import Recorder, collect_timeline
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import start_ranks
from .lib.common import ResultFile
from .lib.masks import density_of
from .lib.mtraining import FUNCTIONS as PEERS
from .lib.mtraining import MTraining, check_peer, measure_peer, refusal
from .lib.ring_options import cases, parsed, planned_case, ring_parser, works
from .lib.ring_plans import Case, Work, cluster_of, name_of, predicted_times
from .lib.ring_rows import PlannedLayer, make_row, random_tensors, table
from .lib.ring_timing import Figures, allocated_bytes, time_steps

LAYOUTS = ["gather:chunks=1", "gather:chunks=2", "collective", "ring:prefetch=1", "ring:prefetch=3"]
DENSE_RINGS: dict[str, Callable[[Mesh], Callable[..., Tensor]]] = {
    "torch-context-parallel": TorchContextParallel,
    "dense-zigzag": ZigzagAttention,
}


def main() -> None:
    """Start the ranks, or be one."""
    arguments = parsed(_parser())
    arguments.layout = arguments.layout or LAYOUTS
    if arguments.toy:
        arguments.gpus = min(arguments.gpus, 2)
    if "RANK" not in os.environ:
        problem = refusal(arguments.baselines, arguments.family, arguments.mtraining, toy=arguments.toy)
        module = "sparsering.benchmarks.ring"
        raise SystemExit(
            problem or start_ranks(sys.argv[1:], world_size=arguments.gpus, environment=os.environ, module=module)
        )
    if arguments.two_nodes:
        os.environ["NCCL_HOSTID"] = f"node{int(os.environ['RANK']) // max(arguments.gpus // 2, 1)}"
    mesh = join(device="cpu" if arguments.toy else None, timeout_s=300)
    arguments.world_size, arguments.nodes = mesh.world_size, 2 if arguments.two_nodes else 1
    try:
        result = ResultFile("ring", folder=arguments.results, gpus=arguments.gpus)
        rows = result.write_as_they_come(
            _measure_all(arguments, mesh), lambda row: table([row]).splitlines()[-1], first_rank=mesh.rank == 0
        )
        if mesh.rank == 0:
            print(table(rows), result.path, sep="\n")
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = ring_parser(__doc__)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--two-nodes", action="store_true", help="NCCL sees two nodes: sockets between the halves")
    parser.add_argument("--layout", action="append", help="name:parameter=value,…; forward+backward may differ: a/b")
    parser.add_argument("--granularity-blocks", type=int, nargs="+", default=[1], help="blocks of one unit")
    parser.add_argument("--baselines", nargs="+", default=[], choices=[*DENSE_RINGS, *PEERS],
                        help="dense rings (slow); MTraining's sparse rings, over every slash mask")  # fmt: skip
    parser.add_argument("--mtraining", type=Path, metavar="FOLDER", help="folder with MTraining's package minference")
    parser.add_argument("--mtraining-inner-size", type=int, metavar="RANKS",
                        help="of the inner rings of mtraining-hierarchical (ranks of a node)")  # fmt: skip
    parser.add_argument("--torch-context-parallel", action="append_const", dest="baselines",
                        const="torch-context-parallel", help="the same as that baseline")  # fmt: skip
    parser.add_argument("--profile", type=Path, help="folder for one timeline per configuration")
    return parser


def _measure_all(arguments: argparse.Namespace, mesh: Mesh) -> Iterator[dict[str, Any]]:
    channels = Channels(mesh)
    peers = _peers(arguments, mesh)
    cluster = cluster_of(arguments.cluster, world_size=mesh.world_size, nodes=arguments.nodes)
    plans = count()
    for work in works(arguments):
        for case in cases(arguments):
            plan = _agreed_plan(arguments, mesh, cluster, case, work, topic=f"benchmark plan {next(plans)}")
            row = _measure_planned(arguments, mesh, channels, plan, work) | {"placement": case.placement}
            yield row | (predicted_times(plan, work, cluster) if mesh.rank == 0 else {})
        if work.family == "slash":
            for peer, errors in peers:
                yield from (row | errors for row in _measure_mtraining(arguments, mesh, peer, work))
    for baseline in dict.fromkeys(arguments.baselines):
        if baseline in DENSE_RINGS:
            yield _measure_dense(arguments, mesh, baseline)


def _peers(arguments: argparse.Namespace, mesh: Mesh) -> list[tuple[MTraining, dict[str, float]]]:
    """MTraining's rings that are asked for, each with its errors on a short sequence."""
    peers = []
    inner_size = arguments.mtraining_inner_size or mesh.world_size // arguments.nodes
    for name in dict.fromkeys(arguments.baselines):
        if name in PEERS:
            peer = MTraining(name, arguments.mtraining, mesh, inner_size=inner_size)
            peers.append((peer, check_peer(peer, arguments.model, seed=arguments.seed)))
    return peers


def _agreed_plan(
    arguments: argparse.Namespace, mesh: Mesh, cluster: Cluster, case: Case, work: Work, *, topic: str
) -> Plan:
    """Rank 0 makes the plan, all have it."""
    made = planned_case(arguments, case, work, cluster).model_dump(mode="json") if mesh.rank == 0 else None
    return Plan.model_validate(mesh.broadcast(topic, made))


def _measure_planned(
    arguments: argparse.Namespace, mesh: Mesh, channels: Channels, plan: Plan, work: Work
) -> dict[str, Any]:
    mask = work.mask.to(mesh.device)
    layer = PlannedLayer(arguments, plan, mask, mesh, channels, allocated_bytes(mesh))
    whole = layer.time()
    row = layer.row(arguments, work, whole) | {
        "nodes": arguments.nodes,
        "imbalance": _imbalance(arguments, layer, work),
    }
    alone = layer.time_alone()
    return row | layer.memory(whole) | {
        "compute_ms": alone.forward_ms + alone.backward_ms,
        "exposed_ms": whole.forward_ms + whole.backward_ms - alone.forward_ms - alone.backward_ms,
        "compute_forward_ms": alone.forward_ms,
        "compute_backward_ms": alone.backward_ms,
        "compute_step_ms": alone.step_ms,
        "pairs_left_out": len(plan.active_pairs().left_out()),
    }  # fmt: skip


def _imbalance(arguments: argparse.Namespace, layer: PlannedLayer, work: Work) -> float:
    """Return the worker imbalance of one recorded step; with --profile its timeline is written too."""
    q, k, v, grad_out = layer.tensors
    bound, mesh = layer.bound, layer.bound.mesh
    recorder = Recorder(device=mesh.device)
    timed = PlannedAttention(bound, channels=Channels(mesh, timed=True), recorder=recorder)
    for _ in range(2):
        dist.barrier()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        recorder.begin()
        timed(q, k, v, layer.mask).backward(grad_out)
    spans = recorder.spans(mesh.rank)
    busy = sum(span.duration_us for span in spans if span.stream == "compute")
    everyone = [torch.zeros(1, device=mesh.device) for _ in range(mesh.world_size)]
    dist.all_gather(everyone, torch.tensor([busy], device=mesh.device))
    if arguments.profile is not None:
        layout = f"{layer.plan.kernels.backend} {work.family} {name_of(layer.plan)}"
        timeline = collect_timeline(mesh, spans, topic=f"profile/{bound.topic}", metadata={"layout": layout})
        if timeline is not None:
            name = layout.translate(str.maketrans("/:=, ", "-----"))
            timeline.save(arguments.profile / f"ring-{name}-{density_of(work.mask):.3f}.json.gz")
    totals = [float(value) for value in everyone]
    return max(totals) / (sum(totals) / len(totals))


def _measure_dense(arguments: argparse.Namespace, mesh: Mesh, name: str) -> dict[str, Any]:
    """A dense zigzag ring: torch's over FlashAttention 2 (16 K/V heads: it takes no grouped queries), or ours."""
    before = allocated_bytes(mesh)
    attend = DENSE_RINGS[name](mesh)
    tensors = _own_tensors(arguments, mesh, getattr(torch, arguments.dtype))
    figures = time_steps(attend, tensors, mesh, 1, before)
    impl = f"{name}-{attend.kernel}" if isinstance(attend, ZigzagAttention) else name
    return _row(arguments, impl, "zigzag ring", figures)


def _measure_mtraining(arguments: argparse.Namespace, mesh: Mesh, peer: MTraining, work: Work) -> list[dict[str, Any]]:
    """Two rows: as it is called, with consecutive tokens on every rank, and with tokens placed as it computes."""
    before = allocated_bytes(mesh)
    tensors = _own_tensors(arguments, mesh, torch.bfloat16)
    figures = measure_peer(peer, work.mask, tensors, arguments.repeats, before)
    given = {"mask": work.family, "density": density_of(work.mask), "columns": work.columns}
    return [
        _row(arguments, peer.name, peer.layout, value) | given | {"placement": placement, "transport": transport}
        for (placement, transport), value in figures.items()
    ]


def _own_tensors(arguments: argparse.Namespace, mesh: Mesh, dtype: torch.dtype) -> list[Tensor]:
    return random_tensors(arguments.model, arguments.seq_len // mesh.world_size, mesh, arguments.seed, dtype)


def _row(arguments: argparse.Namespace, impl: str, layout: str, figures: Figures) -> dict[str, Any]:
    own = {"nodes": arguments.nodes, "peak_bytes": figures.peak_bytes}
    return make_row(arguments, impl, layout, figures) | own


if __name__ == "__main__":
    main()
