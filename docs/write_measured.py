"""Writes the tables of docs/measured/*.md and of the README from benchmarks/results/. `make measured` runs it.

What stands before the mark of a page is written by hand; below it each result file has a section, the newest first:
hardware, versions, command, and a table in which ratios compare rows of that file only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from table_cells import (
    Cell,
    Column,
    Row,
    kernels_alone_ms,
    layer_ms,
    measured,
    number,
    percent,
    plain,
    predicted_ms,
    quickest,
    ratio,
    table,
    tokens,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One result file of one benchmark."""

    name: str
    benchmark: str
    command: str
    date: str
    hardware: str
    versions: Mapping[str, str]
    rows: Sequence[Row]


def read_result(path: Path) -> Result:
    """Read one result file; KeyError names a field that is missing."""
    found = json.loads(path.read_text())
    where = found["hardware"]
    hardware = where if isinstance(where, str) else f"{where['count']} × {where['device']}"
    if isinstance(where, dict) and "validity" in where:
        hardware += f" ({where['validity']})"
    return Result(
        name=path.name, benchmark=found["benchmark"], command=shown_command(found["benchmark"], found["command"]),
        date=found["date"][:10], hardware=hardware, versions=found["versions"], rows=found["rows"],
    )  # fmt: skip


def shown_command(benchmark: str, command: str) -> str:
    """Return a command as one would type it today, without the folders of the machine that it ran on."""
    command = re.sub(r" --(results|work|profile|page|mtraining) \S+", "", command)
    module = f"python -m sparsering.benchmarks.{benchmark}"
    return as_written_today(re.sub(rf"^(sparsering {benchmark}|{benchmark}\.py)", module, command))


def as_written_today(text: str) -> str:
    """Return text with layouts as the command line takes them; older result files give flags as numbers."""
    text = text.replace("narrow_grads", "narrow_gradients")
    return re.sub(r"\b(keep_kv|pull|halves|narrow_gradients)=1", r"\1", text)


def kernels_table(result: Result) -> list[str]:
    """Return rates of one device's kernels, one line a problem: TFLOP/s of every implementation, and their ratios."""
    denses = ("cudnn-dense", "fa2-dense")
    dense = {(row["impl"], row["seq_len"], row["direction"]): row["tflops"] for row in result.rows
             if row["impl"] in denses}  # fmt: skip
    problems: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in result.rows:
        if row["mask"] != "dense" and row["direction"] != "index":
            same = ("mask", "seq_len", "head_dim", "density", "columns", "direction")
            problem = problems.setdefault(tuple(row[name] for name in same), {name: row[name] for name in same})
            problem[row["impl"]] = row["tflops"]
    for problem in problems.values():
        problem |= {name: dense.get((name, problem["seq_len"], problem["direction"])) for name in denses}
        problem["flex"] = max((problem.get(name, 0.0) for name in ("flex", "flex-tma")), default=0.0) or None
    return table(kernels_columns(), list(problems.values()))


def kernels_columns() -> list[Column]:
    """Return the columns of `kernels_table`."""
    rates = [("triton", "ours-triton"), ("flash4", "ours-flash4"), ("FlexAttention, best option", "flex"),
             ("FA4 called directly", "fa4"), ("cuDNN, dense", "cudnn-dense"), ("FA2, dense", "fa2-dense")]  # fmt: skip
    ratios = [("triton ÷ cuDNN", "ours-triton", "cudnn-dense"), ("flash4 ÷ cuDNN", "ours-flash4", "cudnn-dense"),
              ("triton ÷ FA2", "ours-triton", "fa2-dense"), ("triton ÷ FlexAttention", "ours-triton", "flex"),
              ("flash4 ÷ FA4", "ours-flash4", "fa4")]  # fmt: skip
    problem = [Column(heading="tokens", cell=tokens), Column(heading="mask", cell=plain("mask")),
               Column(heading="density", cell=percent("density")), Column(heading="columns", cell=plain("columns")),
               Column(heading="head dim", cell=plain("head_dim")),
               Column(heading="direction", cell=plain("direction"))]  # fmt: skip
    return [
        *problem,
        *(Column(heading=heading, cell=measured(name)) for heading, name in rates),
        *(Column(heading=heading, cell=ratio(field(top), field(bottom))) for heading, top, bottom in ratios),
    ]


def field(name: str) -> Callable[[Row], float | None]:
    """Return a function that gives a field of a row, None where it has none."""
    return lambda row: row.get(name)


def choosing_table(result: Result) -> list[str]:
    """Return what it costs to choose patterns and to build their index, as a share of the attention that follows."""
    columns = [
        Column(heading="selector", cell=plain("selector")), Column(heading="tokens", cell=tokens),
        Column(heading="columns", cell=plain("columns")), Column(heading="choice, ms", cell=measured("time_ms")),
        Column(heading="index, ms", cell=measured("index_ms")),
        Column(heading="index, MB", cell=measured("index_bytes", scale=1e-6)),
        Column(heading="share of forward + backward", cell=percent("share_of_attention")),
    ]  # fmt: skip
    return table(columns, result.rows)


def layer_table(result: Result) -> list[str]:
    """Return one layer over ranks: whole, beside its kernels alone, its memory and what the simulator says."""
    same = ("mask", "density", "columns", "seq_len", "kv_heads", "rank")
    columns = [
        Column(heading="tokens", cell=tokens), Column(heading="mask", cell=plain("mask")),
        Column(heading="density", cell=percent("density")), Column(heading="columns", cell=plain("columns")),
        Column(heading="heads", cell=lambda row: f"{row['heads']}:{row['kv_heads']}"),
        Column(heading="rank", cell=plain("rank")), Column(heading="ranks", cell=plain("ranks")),
        Column(heading="implementation", cell=plain("impl")), Column(heading="layout", cell=shown_layout),
        Column(heading="forward, ms", cell=measured("forward_ms")),
        Column(heading="backward, ms", cell=measured("backward_ms")),
        Column(heading="both, ms", cell=lambda row: number(layer_ms(row))),
        Column(heading="÷ quickest", cell=quickest(result.rows, same, layer_ms)),
        Column(heading="÷ kernels alone", cell=ratio(layer_ms, kernels_alone_ms)),
        Column(heading="÷ simulated", cell=ratio(layer_ms, predicted_ms)),
        Column(heading="worker imbalance", cell=measured("imbalance")),
        Column(heading="memory ÷ predicted", cell=measured("peak_ratio")),
    ]  # fmt: skip
    return table(columns, result.rows)


def layers_table(result: Result) -> list[str]:
    """Return short layers in a row: what each takes, and what it costs the host."""
    same = ("seq_len", "heads", "kv_heads", "mask", "density", "columns")
    host = [f"host_{direction}_ms" for direction in ("forward", "backward")]
    columns = [
        Column(heading="tokens", cell=tokens),
        Column(heading="heads", cell=lambda row: f"{row['heads']}:{row['kv_heads']} of {row['head_dim']}"),
        Column(heading="mask", cell=plain("mask")), Column(heading="density", cell=percent("density")),
        Column(heading="columns", cell=plain("columns")), Column(heading="implementation", cell=plain("impl")),
        Column(heading="forward, ms", cell=measured("forward_ms")),
        Column(heading="backward, ms", cell=measured("backward_ms")),
        Column(heading="÷ quickest", cell=quickest(result.rows, same, layer_ms)),
        Column(heading="host, forward, ms", cell=measured(host[0])),
        Column(heading="host, backward, ms", cell=measured(host[1])),
        Column(heading="host ÷ quickest", cell=quickest(result.rows, same, lambda row: sum(row[one] for one in host))),
    ]  # fmt: skip
    return table(columns, result.rows)


def shown_layout(row: Row) -> str:
    """Return placement and layout; of the peers' rings also whether their exchange of tokens is in the time."""
    if row["impl"].startswith("mtraining"):
        inside = "with" if row["placement"] == "contiguous" else "without"
        return f"{row['layout']}, {inside} its exchange of tokens"
    picked = " (the planner's pick)" if row.get("placement") == "planned" else ""
    return f"{as_written_today(row['layout']).rstrip(':')}{picked}"


def training_table(result: Result) -> list[str]:
    """Return whole training steps: where their time goes, and how they compare."""
    columns = [
        Column(heading="tokens", cell=tokens), Column(heading="attention", cell=plain("impl")),
        Column(heading="layout", cell=shown_layout), Column(heading="density", cell=percent("density")),
        Column(heading="layers kept whole", cell=plain("whole_layers")),
        Column(heading="steps", cell=plain("steps")), Column(heading="warm-ups", cell=plain("warmups")),
        Column(heading="step, s", cell=measured("step_ms", scale=1e-3)),
        Column(heading="÷ quickest", cell=quickest(result.rows, ("seq_len",), lambda row: row["step_ms"])),
        Column(heading="attention, s", cell=measured("attention_ms", scale=1e-3)),
        Column(heading="of it choosing, ms", cell=measured("choosing_ms")),
        Column(heading="of it exposed communication, ms", cell=measured("exposed_communication_ms")),
        Column(heading="else, s", cell=measured("other_ms", scale=1e-3)),
        Column(heading="memory, GiB", cell=measured("memory_bytes", scale=2**-30)),
        Column(heading="MFU", cell=measured("mfu_actual", scale=1)),
        Column(heading="dense-equivalent", cell=measured("mfu_dense_equivalent")),
    ]  # fmt: skip
    return table(columns, result.rows)


def simulator_table(result: Result) -> list[str]:
    """Return how quickly schedules are evaluated, one line a schedule: rank-phases a second and peak memory."""
    same = ("layout", "direction", "ranks", "rank_phases", "slowdown")
    problems: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in result.rows:
        problem = problems.setdefault(tuple(row[name] for name in same), {name: row[name] for name in same})
        if row["metric"] == "engine_peak_memory_bytes":
            problem["memory"] = row["value"]
        else:
            problem[row["evaluator"]] = row["value"]
            if row["evaluator"] == "engine":
                problem["seconds"] = row["seconds"]
    columns = [
        Column(heading="layout", cell=plain("layout")), Column(heading="direction", cell=plain("direction")),
        Column(heading="ranks", cell=plain("ranks")), Column(heading="rank-phases", cell=measured("rank_phases")),
        Column(heading="transfers slow compute", cell=lambda row: "yes" if row["slowdown"] else "no"),
        Column(heading="engine, 1/s", cell=measured("engine")), Column(heading="engine, s", cell=measured("seconds")),
        Column(heading="memory, MiB", cell=measured("memory", scale=2**-20)),
        Column(heading="recurrence, first, 1/s", cell=measured("recurrence, first")),
        Column(heading="recurrence, again, 1/s", cell=measured("recurrence, again")),
    ]  # fmt: skip
    return table(columns, list(problems.values()))


def fidelity_table(result: Result) -> list[str]:
    """Return predictions over what was measured, and whether something in them was fitted to the row."""

    def share(name: str) -> Cell:
        return ratio(lambda row: row.get(f"predicted_{name}"), lambda row: row.get(f"measured_{name}"))

    columns = [
        Column(heading="measured", cell=plain("configuration")), Column(heading="of", cell=plain("direction")),
        Column(heading="measured, s", cell=measured("measured_us", scale=1e-6)),
        Column(heading="predicted ÷ measured", cell=share("us")),
        Column(heading="its attention", cell=share("attention_us")), Column(heading="all else", cell=share("other_us")),
        Column(heading="memory", cell=share("bytes")),
        Column(heading="fitted to", cell=lambda row: "yes" if row.get("calibration") else "no"),
    ]  # fmt: skip
    return table(columns, result.rows)


def faults_table(result: Result) -> list[str]:
    """Return runs with a fault by kind and place: how many passed, named rank and cause, and left something."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        groups.setdefault((row["fault"], row["place"]), []).append(row)
    rows: list[Row] = []
    for (fault, place), runs in sorted(groups.items()):
        named, seconds = [bool(run["named"]) for run in runs if run["could_know"]], [run["seconds"] for run in runs]
        rows.append({"fault": fault, "place": place, "runs": len(runs), "passed": sum(run["passed"] for run in runs),
                     "rank and cause named": f"{sum(named)} of {len(named)}" if named else None,
                     "seconds, median": number(median(seconds)), "longest": number(max(seconds)),
                     "left": sum(run["left_running"] + run["left_listening"] for run in runs)})  # fmt: skip
    return table([Column(heading=name, cell=plain(name)) for name in rows[0]], rows)


def planner_table(result: Result) -> list[str]:
    """Return how quickly traces are planned for, what that gains, and how far it is from the bound."""
    shown = {name: plain(name) for name in ("trace", "cluster", "world_size", "layers", "steps", "best_baseline")}
    shown |= {name: measured(name) for name in ("gain", "seconds", "cpu_seconds")}
    shown |= {"gap": percent("gap"), "memory, GB": measured("peak_bytes", scale=1e-9)}
    return table([Column(heading=name.replace("_", " "), cell=cell) for name, cell in shown.items()], result.rows)


TABLES: dict[str, Callable[[Result], list[str]]] = {
    "kernels": kernels_table, "choosing": choosing_table, "ring": layer_table, "rank": layer_table,
    "training": training_table, "simulator": simulator_table, "fidelity": fidelity_table,
    "faults": faults_table, "planner": planner_table, "layers": layers_table,
}  # fmt: skip
# benchmarks/models.py writes docs/models.md, write_learning.py docs/learning.md; docs/reliability.md tells of a soak.
ELSEWHERE = frozenset({"eval", "models", "soak"})


def page_of(benchmark: str) -> Path:
    """Return the page of a benchmark."""
    return ROOT / f"docs/measured/{benchmark}.md"


def section(result: Result) -> str:
    """Return one result file as a section of its page."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [f"## {result.hardware}, {result.date}", "", f"`{result.name}`; {versions}.", "", f"`{result.command}`", ""]
    return "\n".join([*lines, *TABLES[result.benchmark](result), ""])


def all_results() -> list[Result]:
    """Read all result files, the newest first."""
    return sorted(map(read_result, RESULTS.glob("*.json")), key=lambda result: (result.date, result.name), reverse=True)


def rendered(benchmark: str, results: Sequence[Result]) -> str:
    """Return what belongs between the marks of a benchmark's page."""
    return "\n" + "\n".join(section(result) for result in results if result.benchmark == benchmark) + "\n"


def main() -> None:
    """Rewrite every page of a benchmark that has results."""
    results = all_results()
    for benchmark in sorted({result.benchmark for result in results} - ELSEWHERE):
        page = page_of(benchmark)
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}{rendered(benchmark, results)}{END}{after}")


if __name__ == "__main__":
    main()
