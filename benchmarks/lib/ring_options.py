"""Options that benchmarks/ring.py and benchmarks/rank.py have in common: what is measured, and over which plans."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from ...planner.cost.cluster import Cluster, preset_names
from ...planner.plan import Plan
from .common import RESULTS
from .masks import MASKS
from .ring_plans import MODEL, PLACEMENTS, Case, Work, make_case_plan, make_work


def ring_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of these options; `description` is shown as it stands."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--heads", type=int, nargs=2, default=[MODEL.heads, MODEL.kv_heads], metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, default=MODEL.head_dim)
    parser.add_argument("--family", nargs="+", default=["slash"], choices=list(MASKS), help="kinds of masks")
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.02], help="asked of the mask")
    parser.add_argument("--columns", type=int, default=1024, help="of slash masks; others have none")
    parser.add_argument("--placement", nargs="+", default=["striped"], choices=PLACEMENTS,
                        help="planned: the planner picks placement and layouts, on --cluster")  # fmt: skip
    parser.add_argument("--narrow-gradients", action="store_true",
                        help="planned: the planner may round dK/dV of others")  # fmt: skip
    parser.add_argument("--keep-all-pairs", action="store_true", help="compute and send what a mask never needs, too")
    parser.add_argument("--cluster", default="h200-nvlink-8",
                        help=f"for planned, and for predicted times: file or {', '.join(preset_names())}")  # fmt: skip
    parser.add_argument("--backends", "--backend", nargs="+", default=["triton"], help="triton flash4 blockwise")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="two gloo processes and a small layer, to try the road")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments, those of --toy in place, with what follows from them: `model` (a layer) and `dtype`."""
    arguments = parser.parse_args()
    arguments.dtype = "float32" if arguments.toy else "bfloat16"
    shape: dict[str, int] = {
        "heads": arguments.heads[0], "kv_heads": arguments.heads[1], "head_dim": arguments.head_dim,
    }  # fmt: skip
    if arguments.toy:
        arguments.seq_len, arguments.columns = 2048, 64
        arguments.backends, arguments.cluster = ["blockwise"], "local-cpu-4"
        shape = {"heads": 4, "kv_heads": 2, "head_dim": 32}
    arguments.model = MODEL.model_copy(update=shape)
    return arguments


def works(arguments: argparse.Namespace) -> Iterator[Work]:
    """Draw the masks asked for."""
    for family in arguments.family:
        for density in arguments.density:
            yield make_work(
                family, seq_len=arguments.seq_len, density=density, columns=arguments.columns, seed=arguments.seed,
                heads=arguments.model.heads,
            )  # fmt: skip


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return every combination asked for; what the planner picks does not vary with layout and granularity."""
    found = []
    for placement, granularity, backend, layout in product(
        arguments.placement, arguments.granularity_blocks, arguments.backends, arguments.layout
    ):
        free = placement == "planned"
        found.append(Case(placement=placement, granularity_blocks=1 if free else granularity, backend=backend,
                          layout="" if free else layout))  # fmt: skip
    return list(dict.fromkeys(found))


def planned_case(arguments: argparse.Namespace, case: Case, work: Work, cluster: Cluster) -> Plan:
    """Return a configuration's plan for one mask."""
    return make_case_plan(
        case, work, cluster=cluster, leave_out=not arguments.keep_all_pairs, model=arguments.model,
        dtype=arguments.dtype, narrow_gradients=arguments.narrow_gradients,
    )  # fmt: skip
