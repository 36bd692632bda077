"""The planner on traces of many kinds and on many clusters: how quick, what it gains, how near it is to the bound.

Each plan is made by `sparsering plan` in a process of its own, as users make it, whose wall time, CPU time and memory
are those of the row. Traces are drawn from a seed, or given. No GPU is needed.

    python -m sparsering.benchmarks.planner --steps 8 --families vertical-slash packed-documents
    python -m sparsering.benchmarks.planner --traces real-trace/ --clusters a100-hdr-4x8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..planner.cost.cluster import preset_names
from .lib.common import RESULTS, ResultFile

# family -> (kind of synthetic trace, its density; None: the kind has none)
FAMILIES: dict[str, tuple[str, float | None]] = {
    "dense": ("dense", None),
    "sink-window": ("sink-window", None),
    "vertical-slash-2": ("vertical-slash", 0.02),
    "vertical-slash-5": ("vertical-slash", 0.05),
    "vertical-slash-10": ("vertical-slash", 0.10),
    "skewed-5": ("skewed", 0.05),
    "xattention-5": ("xattention", 0.05),
    "moba-block-5": ("moba-block", 0.05),
    "packed-documents": ("packed-documents", None),
}
CLUSTERS = f"or {', '.join(preset_names())}"
COMMAND = [sys.executable, "-m", "sparsering"]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: seconds, and the most memory that it had."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def ended(command: list[str]) -> Ended:
    """Run a command to its end; CalledProcessError with what it said when it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - began
        said.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, output=said.read())
    return Ended(wall_s=wall_s, cpu_s=used.ru_utime + used.ru_stime, peak_bytes=used.ru_maxrss * 1024)


def drawn(family: str, arguments: argparse.Namespace, folder: Path) -> Path:
    """Draw a trace of the family, once; return its folder."""
    trace = folder / family
    if not trace.exists():
        kind, density = FAMILIES[family]
        sizes = {"seq-len": arguments.seq_len, "heads": arguments.heads, "layers": arguments.layers,
                 "steps": arguments.steps, "seed": arguments.seed, "block-size": arguments.block}  # fmt: skip
        options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        options += [] if density is None else ["--density", str(density)]
        ended([*COMMAND, "synthesize", kind, *options, "-o", str(trace)])
    return trace


def plan_row(name: str, trace: Path, cluster: str, settings: list[str], folder: Path) -> dict[str, Any]:
    """Plan one trace on one cluster; return the row."""
    file = folder / "plan.json"
    chosen = [part for setting in settings for part in ("--set", setting)]
    took = ended([*COMMAND, "plan", "--trace", str(trace), "--cluster", cluster, *chosen, "-o", str(file)])
    plan = json.loads(file.read_text())
    told, manifest = plan["predictions"], json.loads((trace / "manifest.json").read_text())
    header = manifest["header"]
    return {
        "trace": name, "cluster": " ".join([cluster, *settings]), "world_size": plan["placement"]["world_size"],
        "seq_len": header["seq_len_tokens"], "layers": len(header["recorded_layers"]), "steps": len(manifest["parts"]),
        "heads": header["model"]["heads"], "planned_us": told["step_time_us"],
        "best_baseline": told["best_baseline"], "best_baseline_us": told["best_baseline_us"],
        "gain": told["best_baseline_us"] / told["step_time_us"], "bound_us": told["bound_us"], "gap": told["gap"],
        "exposed_fraction": told["exposed_fraction"], "seconds": took.wall_s, "cpu_seconds": took.cpu_s,
        "peak_bytes": took.peak_bytes,
    }  # fmt: skip


def rows_of(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Plan every trace on every cluster."""
    for path, cluster in product(arguments.traces, arguments.clusters):
        yield plan_row(path.name, path, cluster, arguments.set, folder)
    for family, cluster in product(arguments.families, arguments.clusters):
        yield plan_row(family, drawn(family, arguments, folder), cluster, arguments.set, folder)


def shown(row: dict[str, Any]) -> str:
    """Return a row as it is printed."""
    return (f"{row['trace']:18} {row['cluster']:24} {row['world_size']:4} ranks  {row['seconds']:7.1f} s "
            f"({row['cpu_seconds']:6.1f} CPU, {row['peak_bytes'] / 1e9:4.1f} GB)  gain {row['gain']:.3f}  "
            f"gap {100 * row['gap']:5.1f} %")  # fmt: skip


def main() -> None:
    """Plan, print as it goes, write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--traces", type=Path, nargs="*", default=[], help="traces that exist, beside or without those")
    parser.add_argument(
        "--clusters", nargs="+", default=["h200-nvlink-8"], help=f"files, or {', '.join(preset_names())}"
    )
    parser.add_argument("--set", action="append", default=[], help="section.key=value, of every cluster")
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=1, help="training steps of a trace")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = ResultFile("planner", folder=arguments.results)
    with tempfile.TemporaryDirectory() as folder:
        result.write_as_they_come(rows_of(arguments, Path(folder)), shown)
    print(result.path)


if __name__ == "__main__":
    main()
