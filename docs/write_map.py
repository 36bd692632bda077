"""Rewrites the map in docs/architecture.md: for each file the first sentence of its docstring. `make map` runs it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/architecture.md"
HOUSES = {
    "traces": "what a model attends to, and what everybody shares",
    "planner": "who computes what, when; without torch",
    "simulator": "schedules in simulated time; without torch",
    "kernels": "attention on tensors; knows nothing of the others",
    "runtime": "schedules on real processes and GPUs",
}
BEGIN, END = "<!-- map: begin -->\n", "<!-- map: end -->\n"


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"\. (?=[A-Z])", paragraph)[0].removesuffix(".")


def house_map(house: str) -> str:
    """Return the section of one house."""
    paths = sorted(path for path in (ROOT / house).rglob("*.py") if path.name != "__init__.py")
    lines = [f"- `{path.relative_to(ROOT).as_posix()}`: {first_sentence(path)}" for path in paths]
    return "\n".join([f"**{house}/**: {HOUSES[house]}", "", *lines, ""])


def main() -> None:
    """Replace what stands between the two marks."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = "\n".join(house_map(house) for house in HOUSES)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{sections}\n{END}{after}")


if __name__ == "__main__":
    main()
