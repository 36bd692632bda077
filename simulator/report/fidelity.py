"""The page of `sparsering validate`: measured against predicted, on one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...traces.files import write_atomically
from ..comparisons import Comparison, Quantity
from ..validate import Verdict
from .page import rendered_page
from .parts.times import fidelity_values

TITLE = "<title>sparsering validate</title>"


def write_fidelity_page(
    path: Path, rows: Sequence[Comparison], verdicts: Mapping[Quantity, Verdict], missed: Sequence[str]
) -> None:
    """Write the page, atomically. missed: a line for each tolerance that is."""
    files = sorted({row.source for row in rows})
    values = fidelity_values(rows, verdicts) | {"told": []}
    page = rendered_page("fidelity.html", title="sparsering validate", values=values, missed=missed, files=files)
    write_atomically(path, page.encode())
