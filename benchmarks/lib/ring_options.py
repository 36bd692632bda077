"""Options that benchmarks/ring.py and benchmarks/rank.py have in common: what is measured, and over which plans."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...planner.cost.cluster import preset_names
from .common import RESULTS
from .ring_plans import FAMILIES, MODEL, PLACEMENTS


def ring_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of these options; `description` is shown as it stands."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--heads", type=int, nargs=2, default=[MODEL.heads, MODEL.kv_heads], metavar=("QUERY", "KV"))
    parser.add_argument("--family", nargs="+", default=["slash"], choices=FAMILIES, help="kinds of masks")
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
