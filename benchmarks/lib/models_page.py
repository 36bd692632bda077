"""The page docs/models.md from a result file of `benchmarks/models.py`: what is between its two marks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
LONGEST_REASON = 150


def write_page(result: Path, page: Path) -> None:
    """Replace the table of `page` by the rows of a result file."""
    document = json.loads(result.read_text())
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(document, result.name)}\n{END}{after}")


def table(document: Mapping[str, Any], name: str) -> str:
    """Return the families that are right, and those that are refused with the reason, as Markdown."""
    rows = document["rows"]
    right = [row for row in rows if row["right"]]
    refused = [row for row in rows if not row["right"]]
    versions = document["versions"]
    tried = sum("gloo_gradient_error" in row for row in right)
    worst = max(row["gloo_gradient_error"] for row in right if "gloo_gradient_error" in row) if tried else None
    head = (
        f"transformers {versions['transformers']}, torch {versions['torch']}, {document['date'][:10]}, `{name}`: "
        f"{len(right)} of {len(rows)} families are right, {len(refused)} are refused. "
        f"The audit took {max(row.get('seconds', 0.0) for row in rows):.0f} s at most, "
        f"{sum(row.get('seconds', 0.0) for row in rows) / len(rows):.1f} s on average."
    )
    if worst is not None:
        head += f" {tried} were also run on two gloo processes: gradients within {worst:.0e} of the model alone."
    names = ", ".join(f"`{row['family']}`" for row in right)
    return "\n".join([head, "", "**Right**: " + names, "", *_refused(refused)])


def _refused(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| refused | why |", "|---|---|"]
    for row in rows:
        reason = " ".join(str(row["reason"]).split()).replace("|", "/")
        short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 2] + " …"
        upto = row.get("right_up_to_tokens")
        more = f" (right up to {upto:,} tokens)" if upto else ""
        lines.append(f"| `{row['family']}` | {row['about']}: {short}{more} |")
    return lines
