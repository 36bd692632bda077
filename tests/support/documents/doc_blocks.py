"""The fenced blocks of the project's documents, and the commands within them."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from source_files import DOCUMENTS, ROOT, document_id

FENCE = re.compile(
    r"(?:<!-- (?P<mark>not run|file): (?P<said>[^\n]*?) -->\n)?"
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w-]*)[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
WRITTEN = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block. not_run: the reason that stands above it; shows: the file whose text it is."""

    document: Path
    number: int
    language: str
    text: str
    not_run: str | None = None
    shows: str | None = None

    @property
    def place(self) -> str:
        """Where it stands, as "docs/training.md 2"."""
        return f"{document_id(self.document)} {self.number}"

    def lines(self) -> list[str]:
        """Return its lines, those that end with a backslash joined with the next."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    def commands(self) -> list[list[str]]:
        """Return what stands behind its prompts, as words, without comments."""
        prompts = [line.removeprefix("$ ") for line in self.lines() if line.startswith("$ ")]
        return [shlex.split(prompt, comments=True) for prompt in prompts]

    def output(self) -> list[str]:
        """Return its lines that are no commands."""
        return [line for line in self.lines() if not line.startswith("$ ")]


def blocks_of(document: Path, text: str | None = None) -> list[Block]:
    """Return all fenced blocks of a document, in order."""
    found = []
    for number, match in enumerate(FENCE.finditer(document.read_text() if text is None else text), 1):
        said = {match["mark"]: match["said"]} if match["mark"] else {}
        found.append(
            Block(document=document, number=number, language=match["language"],
                  text=textwrap.dedent(match["text"]), not_run=said.get("not run"), shows=said.get("file"))
        )  # fmt: skip
    return found


def all_blocks() -> list[Block]:
    """Return the fenced blocks of all documents but the changelog."""
    return [block for document in WRITTEN for block in blocks_of(document)]


def rules() -> set[str]:
    """Return what the Makefile can make."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
