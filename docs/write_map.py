"""Rewrites the map in docs/architecture.md: each folder with the first sentence of its package. `make map` runs it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/architecture.md"
HOUSES = ("traces", "planner", "simulator", "kernels", "runtime")
BEGIN, END = "<!-- map: begin -->\n", "<!-- map: end -->\n"


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, on one line and without a full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0].removesuffix(".")


def packages(house: str) -> list[Path]:
    """Return the folders of a house that hold Python packages, the house itself first."""
    return sorted(path.parent for path in (ROOT / house).rglob("__init__.py"))


def folder_row(folder: Path) -> str:
    """Return one folder as a row: its path, the sentence of its package, its files by name."""
    files = sorted(path.stem for path in folder.glob("*.py") if path.name != "__init__.py")
    name = folder.relative_to(ROOT).as_posix()
    return f"| `{name}/` | {first_sentence(folder / '__init__.py')} | {', '.join(files)} |"


def rendered() -> str:
    """Return what belongs between the two marks of the document."""
    rows = [folder_row(folder) for house in HOUSES for folder in packages(house)]
    return "\n".join(["", "| folder | what it is | files |", "|---|---|---|", *rows, "", ""])


def main() -> None:
    """Replace what stands between the two marks."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}{rendered()}{END}{after}")


if __name__ == "__main__":
    main()
