"""How quickly schedules are evaluated: the simulator's engine and the planner's recurrence, by ranks and layout.

A rank-phase is one phase of one rank: its waits, calls and launches. Every case runs in a process of its own, on one
core: the schedule is expanded first, then evaluated; seconds are the least of --repeats, of the process's own time. The
recurrence compiles a schedule once, which is timed once, and is asked again for other workloads: it has two rates. Peak
memory is what the process grew by for the engine, schedule and workload included. No GPU is needed.
    python -m sparsering.benchmarks.simulator --ranks 8 32 128 512
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..planner.cost.cluster import Cluster, load_cluster
from ..planner.cost.kernels import datasheet_cost
from ..planner.cost.recurrence import CompiledRecurrence
from ..planner.layouts.registry import parse_layout
from ..planner.schedule.placement import REGULAR_PLACEMENTS
from ..planner.schedule.schedule import DIRECTIONS, Direction
from ..planner.schedule.shape import AttentionShape
from ..planner.schedule.workload import workload
from ..planner.specs import ModelShape
from ..simulator.engine import simulate
from ..traces.pattern import LayerPattern, VerticalSlash
from .lib.common import RESULTS, ResultFile

MODEL = ModelShape(layers=1, heads=8, kv_heads=2, head_dim=128)
BLOCK = 128
BLOCKS_A_RANK = 2
KIBIBYTE = 1024  # the unit of ru_maxrss on Linux


@dataclass(frozen=True, kw_only=True)
class Case:
    """One schedule. slowdown: whether transfers slow compute, as the cluster's file says."""

    cluster: str
    layout: str
    direction: Direction
    ranks: int
    slowdown: bool
    repeats: int

    @property
    def contends(self) -> bool:
        """Whether transfers of different calls share ports: all but forward rings do."""
        return self.layout != "ring" or self.direction == "backward"

    def on(self) -> Cluster:
        """Return the cluster as one node of these ranks."""
        cluster = load_cluster(self.cluster)
        changes: dict[str, Any] = {"nodes": 1, "gpus_per_node": self.ranks}
        if not self.slowdown:
            changes["gpu"] = cluster.gpu.model_copy(update={"communication_slowdown": 0.0, "pull_slowdown": None})
        return cluster.model_copy(update=changes)


def measured(case: Case) -> list[dict[str, Any]]:
    """Return the rows of a case; it is to run in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cluster, tokens = case.on(), case.ranks * BLOCKS_A_RANK * BLOCK
    head = VerticalSlash(columns=np.zeros(0, np.int32), diagonals=np.arange(0, tokens // BLOCK, 3, dtype=np.int32))
    pattern = LayerPattern(seq_len_tokens=tokens, block_size=BLOCK, heads=(head,) * MODEL.heads)
    work = workload(pattern, REGULAR_PLACEMENTS["striped"](
        seq_len_tokens=tokens, world_size=case.ranks, granularity_tokens=BLOCK))  # fmt: skip
    shape = AttentionShape(
        world_size=case.ranks, tokens_per_rank=tokens // case.ranks, heads=MODEL.heads, kv_heads=MODEL.kv_heads,
        head_dim=MODEL.head_dim,
    )  # fmt: skip
    schedule = parse_layout(case.layout).build(shape=shape, direction=case.direction)
    phases = sum(len(schedule.phases(rank)) for rank in range(case.ranks))
    cost = datasheet_cost(cluster.gpu, MODEL, block_size=BLOCK)
    compiled = CompiledRecurrence()
    seconds = {"engine": least_s(lambda: simulate(schedule, work, cluster, cost), case.repeats)}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds["recurrence, first"] = least_s(lambda: compiled(schedule, work, cluster, cost), 1)
    seconds["recurrence, again"] = least_s(lambda: compiled(schedule, work, cluster, cost), case.repeats)
    sizes = {
        "layout": case.layout, "direction": case.direction, "ranks": case.ranks, "rank_phases": phases,
        "slowdown": case.slowdown,
    }  # fmt: skip
    rows = []
    for evaluator, took in seconds.items():
        given = sizes | {"evaluator": evaluator, "seconds": took}
        rows.append({"metric": "rank_phases_per_s", "value": phases / took, **given})
    return [*rows, {"metric": "engine_peak_memory_bytes", "value": grown * KIBIBYTE, **sizes, "evaluator": "engine"}]


def least_s(play: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of the process's own time that a call took."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        play()
        times.append(time.process_time() - began)
    return min(times)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield what is asked for, without large cases in which links contend."""
    for layout in arguments.layouts:
        for direction in DIRECTIONS:
            for ranks in arguments.ranks:
                for slowdown in (False, True):
                    case = Case(
                        cluster=arguments.cluster, layout=layout, direction=direction, ranks=ranks, slowdown=slowdown,
                        repeats=arguments.repeats,
                    )  # fmt: skip
                    if ranks <= (arguments.contended if case.contends or slowdown else max(arguments.ranks)):
                        yield case


def rows_of(found: Iterator[Case]) -> Iterator[dict[str, Any]]:
    """Measure every case in a process of its own."""
    for case in found:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield from pool.apply(measured, (case,))


def line(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    sizes = f"{row['layout']:20} {row['direction']:8} {row['ranks']:4} ranks, slowdown {row['slowdown']!s:5}"
    return f"{sizes} {row['evaluator']:18} {row['metric']} {row['value']:,.0f}"


def main() -> None:
    """Measure, print as it goes, write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--layouts", nargs="+", default=["ring", "gather:chunks=1", "collective"])
    parser.add_argument("--contended", type=int, default=32, help="most ranks, where links are shared")
    parser.add_argument("--cluster", default="h200-nvlink-8", help="file or preset, taken as one node of the ranks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = ResultFile("simulator", folder=arguments.results)
    result.write_as_they_come(rows_of(cases(arguments)), line)
    print(result.path)


if __name__ == "__main__":
    main()
