"""From inputs to one self-contained HTML page: the templates of this folder, plotly once, both colour schemes.

Pages differ in their template; head, style, script and the list of files come from `base.html`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ...traces.dataset.manifest import library_versions
from ...traces.errors import InputError
from ...traces.files import open_regular, write_atomically
from .figures.theme import PALETTE
from .inputs import GENERATOR, Inputs, Source, read_inputs
from .parts.assemble import Report, make_report
from .words import FILTERS

TITLE_BYTES = 1000  # within which a page says what wrote it


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__ or "sparsering.simulator.report", "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


def rendered_page(template: str, *, title: str, sources: Sequence[Source] = (), **values: Any) -> str:
    """Return a template of this folder as a page that needs no network. values: what the template may use."""
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            generator=Markup(GENERATOR),
            palette=PALETTE,
            roles=[[light, role] for role, (light, _) in PALETTE.items()],
            plotly=Markup(get_plotlyjs()),
            sources=sources,
            versions={"python": platform.python_version()} | library_versions("sparsering", "plotly", "numpy"),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **values,
        )
    )


def write_page(paths: Sequence[Path], output: Path) -> Report:
    """Write the report on these files and folders, atomically, and return what it says.

    Raises InputError, before anything is written, for paths that do not exist, files of ours that are damaged, an
    output in the place of something else, and where nothing is known.
    """
    require_page(output)
    inputs = read_inputs(paths, output=output)
    report = make_report(inputs)
    write_atomically(output, report_html(inputs, report).encode())
    return report


def report_html(inputs: Inputs, report: Report, *, template: str = "report.html", **values: Any) -> str:
    """Return the page of a report. template: `report.html` or one that extends it and uses `values`."""
    shown = [str(path.name) for path in inputs.unknown]
    return rendered_page(
        template, title="sparsering report", sources=inputs.sources, report=report, unknown=shown, **values
    )


def require_page(path: Path) -> None:
    """Refuse, before any work, an output that is no page, or in the place of what we did not write: InputError."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError("must end in .html", source=path)
    if path.is_dir() or (path.exists() and path.stat().st_size and GENERATOR not in _beginning(path)):
        raise InputError("exists and is no page of sparsering: it is not overwritten", source=path)


def _beginning(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(TITLE_BYTES).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=path) from error
