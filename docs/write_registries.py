"""Writes what docs/ says of registered layouts, selectors and backends. `make docs` runs it."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from sparsering.kernels.select.registry import Selector, selectors
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.registry import known_layouts
from sparsering.planner.schedule.backends import BACKENDS, BackendFacts

DOCS = Path(__file__).resolve().parent
LAYOUTS = ("layouts.md", "<!-- layouts: begin -->\n", "<!-- layouts: end -->\n")
BACKENDS_TABLE = ("kernels.md", "<!-- backends: begin -->\n", "<!-- backends: end -->\n")
OURS = ("reference", "blockwise", "triton", "flash4")
SELECTORS = ("kernels.md", "<!-- selectors: begin -->\n", "<!-- selectors: end -->\n")


def documented(kind: type) -> str:
    """Return a docstring; what it says of a parameter at the beginning of a line becomes an item of a list."""
    names, lines, within = {field.name for field in fields(kind)}, [], False
    for line in (inspect.getdoc(kind) or "").splitlines():
        name, colon, rest = line.partition(":")
        if colon and name in names:
            lines, within = [*lines, f"- `{name}`:{rest}"], True
        else:
            within = within and bool(line)
            lines.append(f"  {line}" if within else line)
    return "\n".join(lines)


def parameter(field: Field[Any]) -> str:
    """Return one parameter of a layout as a row: name, kind, default."""
    kind = "true or false" if field.type in (bool, "bool") else "whole number"
    default = "must be given" if field.default is MISSING else str(field.default).lower()
    return f"| `{field.name}` | {kind} | {default} |"


def layout_section(layout: type[Layout]) -> str:
    """Return one layout: its docstring and its parameters."""
    rows = [parameter(field) for field in fields(layout)]
    table = ["| parameter | | default |", "|---|---|---|", *rows, ""] if rows else ["It has no parameters.", ""]
    return "\n".join([f"### `{layout.name}`", "", documented(layout), "", *table])


def selector_row(name: str, selector: type[Selector]) -> str:
    """Return one selector as a row: name, what it keeps, what it says of itself, settings with their defaults."""
    settings = [f"`{field.name}` {field.default}" for field in fields(selector) if "about" in field.metadata]
    told = ["yes" if flag else "no" for flag in (selector.causal, selector.keeps_documents)]
    return f"| `{name}` | {selector.help} | {' | '.join(told)} | {', '.join(settings) or 'per head'} |"


def shipped_layouts() -> list[type[Layout]]:
    """Return the layouts that come along, the plainest first: those of others may be registered as well."""
    return [layout for layout in known_layouts() if layout.__module__.startswith("sparsering.")]


def layouts_text() -> str:
    """Return what belongs between the marks of the layouts."""
    return "\n" + "\n".join(layout_section(layout) for layout in shipped_layouts()) + "\n"


def selectors_text() -> str:
    """Return what belongs between the marks of the selectors."""
    ours = {name: kind for name, kind in selectors().items() if kind.__module__.startswith("sparsering.")}
    head = ["", "| selector | keeps | causal | documents | settings |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(selector_row(name, kind) for name, kind in ours.items()), "", ""])


def backend_row(name: str, facts: BackendFacts) -> str:
    """Return one backend as a row: what it takes, and how it launches."""
    padded = "none" if facts.padded_step is None else f"multiples of {facts.padded_step}"
    taken = [listed(facts.head_dims), "" if facts.head_dims is None else padded, listed(facts.block_sizes)]
    told = [facts.joins_keys, facts.fuses_columns, facts.rounds_gradients]
    cells = [*taken, listed(facts.dtypes), *("yes" if flag else "no" for flag in told)]
    return f"| `{name}` | {' | '.join(cells)} |"


def listed(values: tuple[object, ...] | None) -> str:
    """Return values in a row, "any" for None."""
    return "any" if values is None else ", ".join(map(str, values))


def backends_text() -> str:
    """Return what belongs between the marks of the backends."""
    headings = ["backend", "head dims", "padded", "mask blocks, tokens", "types", "joins shards", "fuses columns"]
    head = ["", f"| {' | '.join([*headings, 'rounds dK/dV'])} |", "|" + "---|" * 8]
    return "\n".join([*head, *(backend_row(name, BACKENDS[name]) for name in OURS), "", ""])


PARTS = {BACKENDS_TABLE: backends_text, LAYOUTS: layouts_text, SELECTORS: selectors_text}


def main() -> None:
    """Replace what stands between the marks."""
    for (name, begin, end), text in PARTS.items():
        before, _, rest = (DOCS / name).read_text().partition(begin)
        _, _, after = rest.partition(end)
        (DOCS / name).write_text(f"{before}{begin}{text()}{end}{after}")


if __name__ == "__main__":
    main()
