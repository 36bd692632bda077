"""What `plan` and `check` print for people: the answer first, then what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..traces.output import Table, offer_report, rounded_parts, say, show
from .check.check import CheckReport
from .plan import Plan
from .schedule.schedule import Direction

SHOWN_CANDIDATES = 12
PICKED = "→"
PROVED = (
    "every (query shard, key shard, head) computed exactly once",
    "every dK/dV and output contribution home exactly once",
    "nothing used before it arrives or overwritten while in use",
    "no buffer beyond those stated",
    "no deadlock: launches, waits and buffer releases close no circle",
)
# What parts of the memory of `planner/cost/memory.py` are, for a reader.
MEMORY_PARTS = {
    "home_bytes": "the rank's own queries, keys, values, outputs and gradients",
    "columns_bytes": "gathered columns and their gradients",
    "buffer_bytes": "buffers for other ranks' data",
    "kept_bytes": "keys and values that all other layers keep",
    "workspace_bytes": "what kernels need in passing",
    "index_bytes": "lists of active blocks and shares of their gradients",
}


def show_plan(made: Plan, output: Path) -> None:
    """Print whether planning helps and by how much, the candidates, and how far the pick is from others."""
    told = made.predictions
    say(plan_answer(made), answer=True)
    show(_candidates_table(made))
    say(
        *_margins(made),
        f"balance: the busiest rank computes {told['worker_imbalance']:.3f} times as long as the mean (worker "
        f"imbalance); phase by phase {told['step_imbalance']:.3f} (step imbalance); ranks wait for "
        f"{told['exposed_fraction']:.1%} of the time",
        memory_line(told),
        *_pairs_line(made),
        *(f"note: {note}" for note in told["notes"]),
        f"wrote {output} (digest {made.digest[:12]})",
    )
    offer_report(output)


def plan_answer(made: Plan) -> str:
    """Return one paragraph: does planning help, by how much, against what, and how sure that is."""
    told = made.predictions
    parts = [told["verdict"], f"One layer, forward and backward, takes {_ms(told['step_time_us'])}"]
    plain_us = told["best_baseline_us"]
    if plain_us is not None:
        parts[1] += f" as planned and {_ms(plain_us)} with the best plain layout"
    parts[1] += f" ({_kind(made)})."
    return " ".join(parts)


def memory_line(told: Mapping[str, Any]) -> str:
    """Return the memory of a layer and its parts, in whole MB that add up to the total that is shown."""
    parts = {name: size for name, size in told["memory_parts_bytes"].items() if size}
    whole = rounded_parts(parts, 1e6)
    listed = ", ".join(f"{whole[name]:,} MB {MEMORY_PARTS[name]}" for name in parts)
    limit = told["memory_limit_bytes"] / 1e6
    return f"memory of one layer on a GPU: {sum(whole.values()):,} MB, of which {listed}; the limit is {limit:,.0f} MB"


def _kind(made: Plan) -> str:
    """Return how the times were found, and whether anybody measured what they rest on."""
    told = made.predictions
    how = "simulated" if told["evaluator"] == "simulator" else f"by the {told['evaluator']}"
    cluster = made.provenance.get("cluster", "the cluster")
    if told["unvalidated"]:
        return f"{how}, unvalidated: prices of {cluster} are from data sheets"
    return f"{how}, with measured prices of {cluster}"


def _margins(made: Plan) -> list[str]:
    """Return a line each on the pick, the best plain layout, the runner-up and the lower bound."""
    told, layers = made.predictions, made.model.layers
    pick_us, plain_us, bound_us = told["step_time_us"], told["best_baseline_us"], told["bound_us"]
    lines = [
        f"picked: {in_words(made)}: {_ms(pick_us)} (forward {_ms(told['forward_us'])}, backward "
        f"{_ms(told['backward_us'])})"
    ]
    if plain_us is not None:
        saved_us = (plain_us - pick_us) * layers
        over = f"{_ms(abs(saved_us))} {'less' if saved_us >= 0 else 'more'} over the {layers} layers of a training step"
        best = f"best plain layout: {told['best_baseline']}: {_ms(plain_us)}"
        lines.append(f"{best}; the pick takes {_change(pick_us, plain_us)}, {over}")
    runner_up = _runner_up(told)
    if runner_up is not None:
        other_us = runner_up["step_time_us"]
        lines.append(f"runner-up: {_named(runner_up)}: {_ms(other_us)}, {_change(other_us, pick_us)} than the pick")
    above = f"no schedule on this cluster is quicker, the pick is {told['gap']:.1%} above it"
    below = "the pick's time is below it, since its evaluator overlooks that transfers share links"
    return [*lines, f"lower bound: {_ms(bound_us)}; {above if told['gap'] >= 0 else below}"]


def _runner_up(told: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quickest other candidate that could be executed, by the same evaluator; None without one."""
    others = [
        row
        for row in told["candidates"]
        if row["executable"]
        and row["fits_memory"]
        and row["evaluator"] == told["evaluator"]
        and not _is_pick(row, told)
        and _named(row) != told["best_baseline"]
    ]
    return min(others, key=lambda row: row["step_time_us"], default=None)


def _is_pick(row: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    same = ("placement", "granularity_tokens", "layout", "parameters")
    return told["pick"] is not None and all(row[name] == told["pick"][name] for name in same)


def _named(row: Mapping[str, Any]) -> str:
    """Return placement and layout as `Step` writes them."""
    return f"{row['placement']} ({row['granularity_tokens']} tokens), {row['in_words']}"


def _candidates_table(made: Plan) -> Table:
    told = made.predictions
    rows = sorted(told["candidates"], key=lambda row: (row["evaluator"] != told["evaluator"], row["step_time_us"]))
    shown = [
        row for number, row in enumerate(rows) if number < SHOWN_CANDIDATES or row["baseline"] or _is_pick(row, told)
    ]
    cells = [_candidate_cells(row, told) for row in shown]
    if told["pick"] is None:  # no row has one layout forward and another backward
        figures = _figures_of(told)
        placed = f"{made.placement.name} {made.placement.granularity_tokens}"
        layouts = f"forward {made.forward.value}, backward {made.backward.value}"
        cells.insert(0, (PICKED, placed, layouts, *figures, "picked"))
    return Table(
        title=f"{len(shown)} of {len(rows)} candidates, each with one layout in both directions",
        columns=("", "placement", "layout", "step ms", "worker", "phases", "remarks"),
        rows=cells,
        note="placement: its name and the tokens of a unit; step: one layer, forward and backward; worker, phases: "
        "worker and step imbalance; plain: needs no planner; estimate: by the recurrence, the quicker evaluator",
        text=("placement", "layout", "remarks"),
    )


def _candidate_cells(row: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[str, ...]:
    picked = _is_pick(row, told)
    remarks = ["picked" if picked else "", "plain" if row["baseline"] else "", row["why_not"]]
    remarks += ["" if row["fits_memory"] else "too large", "" if row["evaluator"] == told["evaluator"] else "estimate"]
    placed = f"{row['placement']} {row['granularity_tokens']}"
    return PICKED if picked else "", placed, row["in_words"], *_figures_of(row), ", ".join(filter(None, remarks))


def _figures_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['step_time_us'] / 1e3:,.3f}", f"{row['worker_imbalance']:.3f}", f"{row['step_imbalance']:.3f}"


def _pairs_line(made: Plan) -> list[str]:
    if made.pairs is None:
        return []
    computed, of = int(made.active_pairs().matrix.sum()), made.world_size**2
    return [f"{computed} of {of} pairs of shards can have work; the others are neither computed nor sent"]


def _ms(us: float) -> str:
    return f"{us / 1e3:,.3f} ms"


def _change(us: float, than_us: float) -> str:
    """Return how much more or less a time is than another, in per cent."""
    if not than_us:
        return "as much"
    share = us / than_us - 1.0
    return f"{abs(share):.1%} {'more' if share >= 0 else 'less'}"


def in_words(made: Plan) -> str:
    """Return a plan's placement, ranks and layouts."""
    placed = f"{made.placement.name} in units of {made.placement.granularity_tokens} tokens on {made.world_size} ranks"
    forward, backward = str(made.forward.value), str(made.backward.value)
    if forward == backward:
        return f"{placed}, {forward} in both directions"
    return f"{placed}, forward {forward}, backward {backward}"


def show_proof(made: Plan, reports: Mapping[Direction, CheckReport]) -> None:
    """Print that a plan is proved, what that means, and the sizes of its schedules."""
    say(f"Proved: plan {made.digest[:12]} computes everything once, in time, within its buffers, without deadlock.",
        answer=True)  # fmt: skip
    say(in_words(made))
    rows = []
    for direction, report in reports.items():
        sent = max(map(sum, zip(*report.sent_bytes.values(), strict=True)), default=0)
        sizes = (report.peak_bytes, made.schedule(direction).buffer_bytes, sent)
        counts = (report.tasks, report.transfers, report.phases)
        rows.append((direction, *(f"{count:,}" for count in counts), *(f"{size / 1e6:,.1f}" for size in sizes)))
    show(
        Table(
            columns=("direction", "tasks", "transfers", "phases", "peak MB", "buffers MB", "sent MB"),
            rows=rows,
            note="peak: the most that is held in buffers at once; sent: the most that one rank sends",
            text=("direction",),
        )
    )
    say(*(f"proved: {line}" for line in PROVED))
