"""Real trainings with a fault in one rank: does every process end in time, is the rank named, is nothing left?

Each row is one run of a tiny model over two to four gloo processes, or two GPUs, started as users start it: by
`sparsering train`, by torchrun, rank by rank as a cluster's scheduler does, or `sparsering run`. One fault is planted
in one rank, from outside; kind, place, rank, step, launcher and layout are drawn by the seed.

    python -m sparsering.benchmarks.faults --runs 200 --seed 0
    python -m sparsering.benchmarks.faults --runs 20 --seed 0 --gpus 2 --jobs 4     # NCCL

A run passes when every process ended within the time that its configuration states and what follows from it
(`limit_s`), the exit code is not 0, a line names the rank and the cause where a rank could know them and no line names
another one, nothing is left running or listening, and the next start goes on from the last complete checkpoint. Runs
that must not be harmed (a rank that is slow, but within the time-out) must end with 0. Exit code 1 when a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..planner.layouts.registry import make_layout
from ..planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, make_plan
from ..planner.schedule.placement import striped
from ..runtime.data.writer import Tokenizer, write_data
from ..traces.files import write_json
from .fault_runs import forked
from .fault_runs.cases import KINDS, Case, described, drawn
from .fault_runs.judged import could_know, expected, first_line, limit_s, named, problems, wrongly_blamed
from .fault_runs.pool import in_processes
from .fault_runs.runs import SEQ_LEN_TOKENS, Run, Workplace
from .lib.common import RESULTS, ResultFile

MODEL: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 256, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPU_MODEL = MODEL | {"hidden_size": 256, "intermediate_size": 384}
TOKENS = 16384
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")


def main() -> None:
    """Run all cases, print a line of each and the summary; exit code 1 when one fails."""
    arguments = parser().parse_args()
    cases = drawn(arguments.runs, seed=arguments.seed, gpus=arguments.gpus, forked_share=arguments.forked_share)
    if arguments.only:
        cases = [case for case in cases if case.number in arguments.only]
    if arguments.list:
        print(*(json.dumps(described(case)) for case in cases), sep="\n")
        return
    with tempfile.TemporaryDirectory(prefix="sparsering-faults-") as folder:
        place = prepared(arguments.work or Path(folder), gpus=arguments.gpus)
        began = time.monotonic()
        result = ResultFile("faults", folder=arguments.results, gpus=arguments.gpus or None)
        numbered = {case.number: case for case in cases}
        work = partial(_row, numbered, place, keep=arguments.work is not None)
        longest_first = sorted(numbered, key=lambda number: (not KINDS[numbered[number].kind].silent, -number))
        found = in_processes(longest_first, work, processes=arguments.jobs)
        rows = result.write_as_they_come(found, _line)
        rows.sort(key=lambda row: row["number"])
        result.write(rows)
    failed = [row["number"] for row in rows if not row.get("passed")]
    print(summary(rows), f"{time.monotonic() - began:.0f} s in all; {result.path}", sep="\n")
    if failed:
        print(f"faults: {len(failed)} of {len(rows)} runs failed: {', '.join(map(str, failed))}", file=sys.stderr)
        raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--gpus", type=int, default=0, help="ranks, each on a GPU; 0: gloo processes on CPUs")
    options.add_argument("--jobs", type=int, default=3, help="runs at a time; most of each is waiting")
    options.add_argument("--forked-share", type=float, default=0.0,
                         help="of the runs whose processes may be forked from one that has imported torch")  # fmt: skip
    options.add_argument("--only", type=int, nargs="+", help="numbers of the runs to do, of all that are drawn")
    options.add_argument("--list", action="store_true", help="show what is drawn, and run nothing")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--work", type=Path, help="folder for models, data and runs, which is kept")
    return options


def prepared(folder: Path, *, gpus: int) -> Workplace:
    """Write model, data and plans of all runs, and import what they import."""
    model = GPU_MODEL if gpus else MODEL
    write_json(folder / "model" / "config.json", model)
    if not (folder / "data").exists():
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, model["vocab_size"], TOKENS))
        write_data([folder / "tokens.npy"], folder / "data", Tokenizer("random", model["vocab_size"]))
    for layout in ("gather", "ring") if not gpus else ():
        for ranks in (2, 3, 4):
            _write_plan(folder / f"plan-{layout}-{ranks}.json", layout, ranks)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has asked for GPUs cannot be forked
        forked.preload()
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return Workplace(folder=folder, environment=environment | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"})


def _write_plan(path: Path, layout: str, ranks: int) -> None:
    heads, kv_heads = MODEL["num_attention_heads"], MODEL["num_key_value_heads"]
    tokens = SEQ_LEN_TOKENS["cpu"]
    make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=heads, kv_heads=kv_heads, head_dim=16), seq_len_tokens=tokens,
            block_size=64, dtype="float32", columns_capacity=64,
        ),
        placement=striped(seq_len_tokens=tokens, world_size=ranks, granularity_tokens=64),
        forward=make_layout(layout, {}),
        pattern=PatternSpec(source="choose", selector="sink-window"),
        kernels=KernelSpec.model_validate({"backend": "blockwise"}),
    ).save(path)  # fmt: skip


def _row(cases: dict[int, Case], place: Workplace, number: int, *, keep: bool) -> dict[str, Any]:
    case = cases[number]
    run = Run(case, place)
    seen = run.seen()
    if keep:
        (run.folder / "said.txt").write_text(seen.said)
    else:
        shutil.rmtree(run.folder, ignore_errors=True)
    found, knowable = problems(case, seen), could_know(case)
    return described(case) | {
        "limit_s": limit_s(case),
        "seconds": seen.seconds,
        "exit_codes": ", ".join(f"{name}: {code}" for name, code in seen.codes.items()),
        "said": first_line(seen.said),
        "could_know": knowable,
        "named": named(case, seen) if expected(case, seen) else None,
        "wrongly_blamed": ", ".join(wrongly_blamed(case, seen)),
        "ended": None not in seen.codes.values(),
        "left_running": len(seen.left),
        "left_listening": seen.listening,
        "left_partial": len(seen.partial),
        "complete_checkpoint": max(seen.complete, default=None),
        "next_start": seen.next_start,
        "problem": "; ".join(found),
        "passed": not found,
    }


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['number']}: the benchmark itself failed: {row['error']}"
    verdict = "ok" if row["passed"] else f"FAILED ({row['problem']})"
    where = f"{row['launcher']}, {row['started']}, rank {row['rank']} of {row['ranks']}, {row['place']}"
    fault = f"{row['fault']} {row['detail']}".strip()
    return f"{row['number']:3d} {row['seconds']:6.1f} s {verdict}: {fault}: {where}: {row['said']}"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return how many runs of each kind passed, and in what all of them together fell short."""
    lines = []
    for kind in KINDS:
        own = [row for row in rows if row.get("fault") == kind]
        if own:
            lines.append(f"{kind}: {sum(row['passed'] for row in own)} of {len(own)}")
    knowable = [row for row in rows if row.get("could_know")]
    lines.append(f"rank and cause named: {sum(bool(row['named']) for row in knowable)} of {len(knowable)} that could")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
