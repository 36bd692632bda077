"""The ladder as a Markdown page and as a benchmark result."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..traces.dataset.manifest import library_versions
from ..traces.errors import InputError
from ..traces.files import read_bytes
from .ladder import ASSUMPTIONS, CLUSTER, Ladder, Outcome

BENCHMARK = "ladder"
HEADINGS = (
    "rung",
    "forward, ms a layer",
    "backward, ms a layer",
    "training step, s",
    "speed-up",
    "published",
    "worker imbalance",
    "step imbalance",
    "exposed",
)
INTRODUCTION = """# MTraining's ladder, simulated

What each idea of MTraining (arXiv 2510.18830) gains, as our simulator sees it: Qwen2.5-3B, one sequence of 524,288
tokens, 32 A100s in 4 nodes (preset `{cluster}`). Every number is **unvalidated**: it comes from data sheets, published
figures and the assumptions below, not from a run on such a cluster. Nothing was fitted to the published speed-ups.
"""
PUBLISHED = """## Published figures

- Up to **6x** training throughput (Qwen2.5-3B, 512K tokens, 32 A100): the paper's abstract.
- 2.9x with a zigzag ring and 4.6x without the hierarchical ring; 95 % sparsity; imbalance (maximum over mean) above 2.4
  for zigzag and near 1.0 for striping; 0.51 ms of compute, 0.98 ms over InfiniBand and 0.13 ms over NVLink for a step
  of the ring in forward; forward attention of a layer 34.10 ms without and 19.53 ms with the hierarchical ring, of
  which 3.21 ms choose the index: as quoted by a public summary of the paper's evaluation; not checked against the
  paper. Whether the zigzag variant keeps the hierarchical ring is not said, so both are simulated.
- Recomputation of decoder layers: `mtraining/train.py` of `microsoft/MInference`, branch `wenxuan/mtrain`, commit
  f74982d.
"""
READING = """## Reading it

- *exposed*: share of attention's time in which the mean GPU's compute waits. *step imbalance*: forward.
- Published forward times of a layer include choosing; so does the line under each table.
- The sparse forward efficiency is set by one published number, the 0.51 ms of a step: that mean is an input. The
  speed-ups, the exposed communication, the imbalance and the ring's total are outputs.
- No backward time is published for these kernels on an A100. It is most of a step, so it is the figure to measure
  first; the last table shows what it decides.
"""


def require_page(path: Path) -> None:
    """Refuse, before any work, to write the page in the place of something else than an older page: InputError."""
    title = INTRODUCTION.partition("\n")[0].encode()
    if path.exists() and not read_bytes(path).startswith(title):
        raise InputError("exists and is no page of the ladder: it is not overwritten", source=path)


def markdown(ladders: Sequence[Ladder], *, command: str) -> str:
    """Return the page."""
    parts = [INTRODUCTION.format(cluster=CLUSTER), f"Made by `{command}`.\n"]
    for ladder in ladders:
        parts.append(f"## {ladder.variant.title[0].upper()}{ladder.variant.title[1:]}\n")
        parts.append(_table(ladder))
        parts.append(_forward_line(ladder))
    assumptions = "\n".join(f"- {line}" for line in ASSUMPTIONS)
    return "\n".join([*parts, READING, PUBLISHED, f"## Assumptions\n\n{assumptions}\n"])


def _table(ladder: Ladder) -> str:
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1))]
    rows += [_cells(ladder, outcome) for outcome in ladder.outcomes]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cells(ladder: Ladder, outcome: Outcome) -> tuple[str, ...]:
    published = outcome.rung.published
    return (
        outcome.rung.name,
        f"{outcome.forward.makespan_us / 1e3:.1f}",
        f"{outcome.backward.makespan_us / 1e3:.1f}",
        f"{outcome.step_us / 1e6:.2f}",
        f"{ladder.speed_up(outcome):.2f}x",
        "–" if published is None else f"{published:.1f}x",
        f"{outcome.forward.worker_imbalance:.2f}",
        f"{outcome.forward.step_imbalance:.2f}",
        f"{outcome.exposed:.0%}",
    )


def _forward_line(ladder: Ladder) -> str:
    flat, hierarchical = ladder.outcomes[2], ladder.outcomes[3]
    times = [(one.forward.makespan_us + one.choosing_us) / 1e3 for one in (flat, hierarchical)]
    return (
        f"Forward of a layer with choosing, striped: {times[0]:.2f} ms flat and {times[1]:.2f} ms hierarchical"
        f" (published: 34.10 and 19.53). Sparse kernels at {ladder.sparse_forward_efficiency:.1%} (forward) and"
        f" {ladder.sparse_backward_efficiency:.1%} (backward) of peak. Outside attention: {flat.other_us / 1e6:.2f} s a"
        " step.\n"
    )


def result_document(ladders: Sequence[Ladder], *, command: str) -> dict[str, Any]:
    """Return a benchmark result: one flat row per variant and rung."""
    return {
        "benchmark": BENCHMARK,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"simulated {CLUSTER} (unvalidated)",
        "versions": library_versions("sparsering", "numpy", "simpy"),
        "assumptions": list(ASSUMPTIONS),
        "rows": [_row(ladder, outcome) for ladder in ladders for outcome in ladder.outcomes],
    }


def result_path(folder: Path, document: dict[str, Any]) -> Path:
    """Return `ladder-<cluster>-<time>.json` in the folder."""
    stamp = document["date"].replace("+00:00", "Z").replace(":", "")
    return folder / f"{BENCHMARK}-{CLUSTER}-{stamp}.json"


def _row(ladder: Ladder, outcome: Outcome) -> dict[str, Any]:
    links = ladder.variant.cluster
    assert links.inter_node is not None
    return {
        "variant": ladder.variant.title,
        "rung": outcome.rung.name,
        "placement": outcome.rung.placement,
        "layout": outcome.rung.layout,
        "sparse": outcome.rung.sparse,
        "forward_ms": outcome.forward.makespan_us / 1e3,
        "backward_ms": outcome.backward.makespan_us / 1e3,
        "choosing_ms": outcome.choosing_us / 1e3,
        "attention_s": outcome.attention_us / 1e6,
        "other_s": outcome.other_us / 1e6,
        "step_s": outcome.step_us / 1e6,
        "speed_up": ladder.speed_up(outcome),
        "published_speed_up": outcome.rung.published,
        "worker_imbalance": outcome.forward.worker_imbalance,
        "step_imbalance": outcome.forward.step_imbalance,
        "exposed": outcome.exposed,
        "sparse_forward_efficiency": ladder.sparse_forward_efficiency,
        "sparse_backward_efficiency": ladder.sparse_backward_efficiency,
        "intra_node_bytes_per_us": links.intra_node.bandwidth_bytes_per_us,
        "inter_node_bytes_per_us": links.inter_node.bandwidth_bytes_per_us,
        "validity": "unvalidated",
    }
