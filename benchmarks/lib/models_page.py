"""The page docs/models.md from a result file of `benchmarks/models.py`: what is between its two marks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .families import CARRIES_STATE, LOOKS_AHEAD, NOT_ALONE

BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
LONGEST_REASON = 150
# What is refused and no causal language model whose tokens meet in attention alone: see `families.py`.
GROUPS = {
    CARRIES_STATE: "layers carry a state along the sequence (recurrences, convolutions)",
    LOOKS_AHEAD: "alone, an earlier token's logits change with a later token",
    NOT_ALONE: "alone, they neither run nor learn from token ids (images, codebooks, states of another model)",
}


def write_page(result: Path, page: Path) -> None:
    """Replace the table of `page` by the rows of a result file."""
    document = json.loads(result.read_text())
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(document, result.name)}\n{END}{after}")


def table(document: Mapping[str, Any], name: str) -> str:
    """Return the families that are right, and those that are refused with the reason, as Markdown."""
    rows, versions = document["rows"], document["versions"]
    right = [row for row in rows if row["right"]]
    groups = {kind: [row for row in rows if not row["right"] and row.get("group") == kind] for kind in (*GROUPS, None)}
    short = [row for row in right if row.get("right_up_to_tokens")]
    of = len(right) + len(groups[None])
    tried = [row["gloo_gradient_error"] for row in right if "gloo_gradient_error" in row]
    seconds = [row.get("seconds") or 0.0 for row in rows]
    share = f"{len(right)} of these {of} are right ({100 * len(right) / of:.1f} %)"
    head = (
        f"transformers {versions['transformers']}, torch {versions['torch']}, {document['date'][:10]}, `{name}`: of "
        f"{len(rows)} families {of} are causal language models without a state along the sequence; **{share}**, "
        f"{len(groups[None])} are refused. {len(short)} of those that are right choose keys for each query themselves, "
        "and are right up to the length at which that is all keys: "
        f"without them it is {len(right) - len(short)} of {of}. The audit took {max(seconds):.0f} s at most, "
        f"{sum(seconds) / len(rows):.1f} s on average."
    )
    if tried:
        head += (
            f" {len(tried)} were also run on two gloo processes: gradients within {max(tried):.0e} of the model alone."
        )
    lines = [head, "", f"**Right**: {_names(row for row in right if not row.get('audited_as'))}", ""]
    for kind in sorted({row["audited_as"].partition(",")[0] for row in right if row.get("audited_as")}):
        these = [row for row in right if (row.get("audited_as") or "").startswith(kind)]
        lines += [f"**Right as {kind}**: {_names(these)}", ""]
    lines += [f"**Refused, {len(groups[None])}:**", "", *_refused(groups[None]), ""]
    for kind, told in GROUPS.items():
        lines += [f"**Not counted, {len(groups[kind])}: {told}**", "", *_refused(groups[kind]), ""]
    return "\n".join(lines).rstrip()


def _names(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return families in a row, with what was audited and the length up to which it holds."""
    shown = []
    for row in rows:
        form, limit = (row.get("audited_as") or "").partition(", ")[2], row.get("right_up_to_tokens")
        said = [f"`{form}`"] if form and "is_decoder" not in form else []
        said += [f"up to {limit:,} tokens"] if limit else []
        shown.append(f"`{row['family']}`" + (f" ({', '.join(said)})" if said else ""))
    return ", ".join(shown)


def _refused(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| refused | why |", "|---|---|"]
    for row in rows:
        reason = " ".join(str(row["reason"]).split()).replace("|", "/")
        short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 2] + " …"
        upto = row.get("right_up_to_tokens")
        more = f" (right up to {upto:,} tokens)" if upto else ""
        lines.append(f"| `{row['family']}` | {row['about']}: {short}{more} |")
    return lines
