"""Sparse attention kernels side by side: ours, FlexAttention, and dense cuDNN and FlashAttention-2, on the same masks.

One process, one GPU; every sparse result is checked against float64 on sampled rows before it is timed. Rates count
matmul FLOPs of active blocks whole, plus 4 D for each causal (query, column) pair; backward counts 2.5 times that.
    python -m sparsering.benchmarks.kernels --seq-lens 131072 --densities 0.1 0.05 0.02 --columns 0 1024
    python -m sparsering.benchmarks.kernels --as sm_80 --impls fa2-dense ours-triton flex     # the A100 path, on Hopper
    python -m sparsering.benchmarks.kernels --families window band --densities 0.0625 --impls cudnn-dense ours-triton
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..kernels.tools.tune import median_ms
from ..kernels.triton import tuning
from .lib.common import RESULTS, ResultFile
from .lib.kernel_impls import DENSE, SPARSE, Implementation, Problem
from .lib.kernel_oracle import check
from .lib.masks import MASKS, density_of, forward_flops

SUSTAINED_MS = 600.0
GROWTH_REPEATS = 41
FAMILIES = ("slash", "xattention", "moba", "window", "band")


def time_ms(call: Callable[[], object], repeats: int, *, sustained_ms: float = SUSTAINED_MS) -> float:
    """Median milliseconds of a call by CUDA events, at the clock that sustained work leaves.

    Short bursts run on a cool chip at a higher clock than dense attention, which takes a second: every implementation
    is repeated for at least sustained_ms (half of it untimed), so that ratios compare the same clock.
    """
    once = max(median_ms(call, repeats=1, warmups=1), 0.05)
    sustained = min(200, int(sustained_ms / 2 / once))
    return median_ms(call, repeats=max(repeats, sustained), warmups=sustained)


def alternating_ms(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each call, all of them in turn, so that their ratios do not depend on a drifting clock."""
    for call in calls:
        call()
    events = [[(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
              for _ in range(2 * repeats)]  # fmt: skip
    for row in events:
        for call, (start, end) in zip(calls, row, strict=True):
            start.record()
            call()
            end.record()
    torch.cuda.synchronize()
    kept = events[repeats:]  # the first half only warms
    return [sorted(row[i][0].elapsed_time(row[i][1]) for row in kept)[repeats // 2] for i in range(len(calls))]


def column_growth(
    implementation: Implementation, problem: Problem, without: Problem, growth_flops: float
) -> dict[str, dict[str, float]]:
    """What columns add to each direction: growth of time beside growth of FLOPs, both calls measured in turn."""
    implementation.prepare(without)
    pair = [problem, without]
    states = [implementation.forward(p) for p in pair]
    calls = {
        "forward": [lambda p=p: implementation.forward(p) for p in pair],
        "backward": [lambda p=p, s=s: implementation.backward(p, s) for p, s in zip(pair, states, strict=True)],
    }
    found = {}
    for direction, both in calls.items():
        more, less = alternating_ms(both, GROWTH_REPEATS)
        growth = more / less - 1
        found[direction] = {"alternating_ms": more, "alternating_without_columns_ms": less, "growth_time": growth,
                            "growth_flops": growth_flops}  # fmt: skip
        print(f"        columns add {100 * growth:5.1f} % of time to the {direction}, {100 * growth_flops:.1f} % of "
              f"FLOPs: {growth / growth_flops:.2f}", flush=True)  # fmt: skip
    return found


def measure(implementation: Implementation, problem: Problem, repeats: int) -> dict[str, float]:
    """Milliseconds of each direction (and of building the index, where there is one)."""
    implementation.prepare(problem)
    times = {"forward": time_ms(lambda: implementation.forward(problem), repeats)}
    state = implementation.forward(problem)
    times["backward"] = time_ms(lambda: implementation.backward(problem, state), repeats)
    if problem.mask is not None:
        times["index"] = time_ms(lambda: implementation.prepare(problem), repeats, sustained_ms=0)
    return times


def make_rows(
    arguments: argparse.Namespace, impl: str, mask: dict[str, Any], flops: float, times: dict[str, float],
    dense: dict[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return and print a row for each direction. mask: its columns of the result; dense: rates to set it beside."""
    rows = []
    shape = {"heads": arguments.heads[0], "kv_heads": arguments.heads[1], "head_dim": arguments.head_dim}
    for direction, took in times.items():
        rate = {"forward": 1.0, "backward": 2.5, "index": 0.0}[direction] * flops / took / 1e9
        row = {"impl": impl, **mask, "seed": arguments.seed, "direction": direction}
        row |= {"time_ms": took, "tflops": rate, **shape, "block": arguments.block}
        rows.append(row | ({"architecture": arguments.architecture} if arguments.architecture else {}))
        share = f"{100 * rate / dense[direction]:5.1f} % of dense" if direction in dense else ""
        print(
            f"{mask['seq_len']:7} {mask['mask']:10} {mask['density']:.4f} c{mask['columns']:<5} {impl:12} "
            f"{direction:8} {took:9.3f} ms {rate:6.1f} TFLOP/s {share}",
            flush=True,
        )
    return rows


def run_length(arguments: argparse.Namespace, seq_len: int) -> list[dict[str, Any]]:
    """All rows of one sequence length; the dense baselines once."""
    rows, dense, (heads, kv_heads) = [], {}, arguments.heads
    tensors = Problem.tensors(seq_len, heads, kv_heads, arguments.head_dim, arguments.seed)
    for name in ("cudnn-dense", "fa2-dense") if seq_len <= arguments.dense_limit else ():
        if name in arguments.impls:
            times = measure(DENSE[name], Problem(*tensors, mask=None), max(3, arguments.repeats // 3))
            flops = 2.0 * arguments.head_dim * heads * seq_len * seq_len
            described = {"seq_len": seq_len, "mask": "dense", "density": 1.0, "columns": 0}
            made = make_rows(arguments, name, described, flops, times, dense)
            rows += made
            if name == ("fa2-dense" if arguments.architecture else "cudnn-dense"):
                dense = {row["direction"]: row["tflops"] for row in made}
            gc.collect()
    for family, density in product(arguments.families, arguments.densities):
        for columns in arguments.columns if family == "slash" else [0]:
            extra = (columns,) if family == "slash" else ()
            mask = MASKS[family](seq_len, density, *extra, heads=heads, block=arguments.block, seed=arguments.seed)
            described = {"seq_len": seq_len, "mask": family, "density": round(density_of(mask), 4), "columns": columns}
            described |= {"softcap": arguments.softcap} if arguments.softcap else {}
            described |= {"sinks": True} if arguments.sinks else {}
            sinks = torch.linspace(-2, 2, heads, device="cuda") if arguments.sinks else None
            for name in arguments.impls:
                problem = Problem(*tensors, mask=mask.to("cuda"), softcap=arguments.softcap, sinks=sinks)
                if name in SPARSE and SPARSE[name].supports(problem):
                    rows += _measure_sparse(arguments, name, described, problem, dense)
                    gc.collect()
                    torch.cuda.empty_cache()
    return rows


def _measure_sparse(
    arguments: argparse.Namespace, name: str, described: dict[str, Any], problem: Problem, dense: dict[str, float]
) -> list[dict[str, Any]]:
    """Check one implementation on one mask, time it, and say what columns add."""
    implementation, mask = SPARSE[name], problem.mask
    implementation.prepare(problem)
    worst = check(implementation, problem, seed=arguments.seed)
    flops = forward_flops(mask, arguments.head_dim)
    rows = make_rows(arguments, name, described, flops, measure(implementation, problem, arguments.repeats), dense)
    rows[-1]["index_bytes"] = problem.index_bytes
    print(f"        relative errors on sampled rows: {worst}", flush=True)
    if mask.columns is None:
        return rows
    without = replace(problem, mask=replace(mask, columns=None), built={})
    growth = flops / forward_flops(without.mask, arguments.head_dim) - 1
    found = column_growth(implementation, problem, without, growth)
    return [row | found.get(row["direction"], {}) for row in rows]


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark of attention on one GPU."""
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 2], metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dense-limit", type=int, default=131072, help="longest sequence the dense baselines run")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)


def main() -> None:
    """Measure, print as it goes, write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[65536, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.10, 0.05, 0.02])
    parser.add_argument("--columns", type=int, nargs="+", default=[0, 1024])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["slash"])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--softcap", type=float, help="of the scores")
    parser.add_argument("--sinks", action="store_true", help="a learned logit a head beside the keys")
    parser.add_argument("--impls", nargs="+", default=[*DENSE, *SPARSE], choices=[*DENSE, *SPARSE])
    parser.add_argument("--launches", type=Path, help="a file of doctor --kernels --tune")
    parser.add_argument("--as", dest="architecture", choices=["sm_80"], help="compile Triton's kernels as for an A100")
    shared_arguments(parser)
    arguments = parser.parse_args()
    if arguments.architecture:
        from .lib import as_sm80  # it needs Triton's NVIDIA backend, which CPUs have not

        as_sm80.enable()
    if arguments.launches:
        tuning.use(**json.loads(arguments.launches.read_text()))
    rows = [row for seq_len in arguments.seq_lens for row in run_length(arguments, seq_len)]
    print(ResultFile("kernels", folder=arguments.results, gpus=1).write(rows))


if __name__ == "__main__":
    main()
