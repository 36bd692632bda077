"""The verb `export`: a timeline in the form that another tool reads. No torch is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import unknown_name
from ..timeline import Timeline
from .hta import write_hta

FORMATS = {"hta": write_hta}


def export(
    timeline: Annotated[Path, typer.Argument(help="Timeline of `simulate`, `run` or `train`: .json or .json.gz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: new, or empty.")],
    form: Annotated[str, typer.Option("--format", help="hta: one file per rank, for Holistic Trace Analysis.")] = "hta",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a timeline as Holistic Trace Analysis reads it: one torch.profiler trace per rank.

    Perfetto (https://ui.perfetto.dev) shows timelines as they are, and needs no export.
    """
    if form not in FORMATS:
        raise unknown_name(form, FORMATS, field="--format")
    written = FORMATS[form](Timeline.load(timeline), output)
    if as_json:
        typer.echo(json.dumps({"format": form, "files": [str(path) for path in written]}))
    else:
        typer.echo(f"{len(written)} files, one a rank, in {output}")
