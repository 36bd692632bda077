"""The project's own sources and documents, read as text, and the scripts of docs/ that write parts of these."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGE = "sparsering"
MAY_IMPORT = {
    "traces": {"traces"},
    "planner": {"traces", "planner"},
    "simulator": {"traces", "planner", "simulator"},
    "kernels": {"kernels"},
    "runtime": {"traces", "planner", "kernels", "runtime"},
}


def imported_modules(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute name) of everything that the file at `path` below the root imports, at any depth.

    `from ..traces import pattern` in planner/x.py yields "sparsering.traces.pattern".
    """
    package = [PACKAGE, *Path(path).parent.parts]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node) in {"import_module", "__import__"}:
            yield node.lineno, _dynamic_import(node, package)


def _dynamic_import(node: ast.Call, package: list[str]) -> str:
    """Return what an import_module call names; a computed name is "?", or "" where it starts at `__package__`.

    For the latter, such as a table of backends, `violations` refuses strings that climb out of the package.
    """
    if node.args and isinstance(node.args[0], ast.Constant):
        name = str(node.args[0].value)
        above = len(name) - len(name.lstrip("."))
        return ".".join([*package[: len(package) - above + 1], name.lstrip(".")]) if above else name
    is_relative = len(node.args) == 2 and isinstance(node.args[1], ast.Name) and node.args[1].id == "__package__"
    return "" if is_relative else "?"


def _called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def load_script(name: str) -> ModuleType:
    """Return a script of docs/ as a module; its `main` is not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def between(text: str, begin: str, end: str) -> str:
    """Return what stands between two marks, each of which must be there once."""
    assert (text.count(begin), text.count(end)) == (1, 1)
    return text.partition(begin)[2].partition(end)[0]


def document_id(path: Path) -> str:
    """Return a document's name within the repository, for the names of tests."""
    return path.relative_to(ROOT).as_posix()
