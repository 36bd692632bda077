"""Rewrites files that documents show whole: what follows a mark such as `<!-- file: ring_forward.py -->`.

The path is relative to the document. `make includes` runs it.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SHOWN = re.compile(r"(<!-- file: (\S+) -->\n)```python\n.*?```\n", re.DOTALL)


def filled(document: Path) -> str:
    """Return the text of a document with the files that it shows as they are now."""

    def shown(match: re.Match[str]) -> str:
        return f"{match[1]}```python\n{(document.parent / match[2]).read_text()}```\n"

    return SHOWN.sub(shown, document.read_text())


def main() -> None:
    """Rewrite all documents that show files."""
    for document in DOCS.rglob("*.md"):
        document.write_text(filled(document))


if __name__ == "__main__":
    main()
