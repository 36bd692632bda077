"""The verb `report`: one page on whatever files of ours there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .page import write_page


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Files or folders: trace, plans, timelines, training metrics, evaluations, results."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write (.html).")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write one self-contained HTML page that says whether planning helps, and shows why.

    Files are known by what they hold, whatever their names; what is not ours is listed on the page and left alone. A
    folder is searched with all its folders.
    """
    with Console(stderr=True).status("reading, and simulating the baseline beside the plan"):
        made = write_page(paths, output)
    if as_json:
        answer = made.answer
        gain = None if answer.gain is None else answer.gain.saved_share
        facts = {"report": str(output), "helps": answer.helps, "saved_share": gain, "sentence": answer.sentence}
        typer.echo(json.dumps(facts | {"parts": [part.template for part in made.parts]}))
        return
    console = Console(highlight=False, markup=False)
    console.print(made.answer.sentence)
    console.print(f"report: {output}", soft_wrap=True)
