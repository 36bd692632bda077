"""The documents, and the scripts of docs/ that write parts of them, for the tests that hold these current."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


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
