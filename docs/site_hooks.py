"""What the site adds to docs/: pages and files outside of it that its pages link to. mkdocs.yml names this file.

A link out of docs/, such as `../examples/README.md`, works in a checkout and on a code host. In the site the file it
leads to is served below `repository/`, and links to and from it are rewritten. A link to what does not exist is left as
it is: mkdocs, which is run strictly, refuses it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
OUTSIDE = "repository"
LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)")


def place_of(path: Path) -> str:
    """Return where a file of the repository stands in the site's sources: as in docs/, or below `repository/`."""
    inside = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if inside else f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def linked(document: Path) -> Iterator[Path]:
    """Yield the files of the repository that a document links to."""
    for _, target in LINK.findall(document.read_text()):
        path = (document.parent / target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path


def outside_files() -> list[Path]:
    """Return all files outside docs/ that its pages lead to, directly or through each other."""
    found: list[Path] = []
    waiting = [path for page in sorted(DOCS.rglob("*.md")) for path in linked(page)]
    while waiting:
        path = waiting.pop(0)
        if not path.is_relative_to(DOCS) and path not in found:
            found.append(path)
            waiting += linked(path) if path.suffix == ".md" else []
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Serve the files outside docs/ that pages lead to."""
    for path in outside_files():
        file = File.generated(config, place_of(path), abs_src_path=str(path))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of a page lead to where their files stand in the site."""
    place = page.file.src_uri
    source = ROOT / place.removeprefix(f"{OUTSIDE}/") if place.startswith(f"{OUTSIDE}/") else DOCS / place

    def moved(match: re.Match[str]) -> str:
        path = (source.parent / match[2]).resolve()
        if not path.is_file() or not path.is_relative_to(ROOT):
            return match[0]
        return match[1] + os.path.relpath(place_of(path), os.path.dirname(place))

    return LINK.sub(moved, markdown)
