"""Evaluations: is far context worth anything, is it found, and how far is sparse attention from dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import Cell, Evaluation, short_tokens
from ..figures.evaluation import Line, needle_figure, position_figure, reach_figure
from ..figures.theme import GREEN, ORANGE, SLATE
from .part import Part, drawing

MOST_EVALUATIONS = 8
COLOURS = {"dense": SLATE, "sparse": GREEN}
ARMS = {"dense": "dense attention", "sparse": "sparse attention"}
PLACES = {"last": "the question stands last", "mid": "the question stands in mid-document"}
TASKS = {"needle": "needles", "tracking": "variable tracking", "aggregation": "most frequent word"}


def evaluation_part(evaluations: Sequence[tuple[Path, Evaluation]]) -> Part | None:
    """Return what each evaluation found."""
    if not evaluations:
        return None
    shown = evaluations[:MOST_EVALUATIONS]
    groups = [_group(number, path, one) for number, (path, one) in enumerate(shown)]
    values = {"groups": groups, "left_out": len(evaluations) - len(shown)}
    return Part(template="evaluation", title="What far context is worth", values=values)


def _group(number: int, path: Path, one: Evaluation) -> dict[str, Any]:
    lines = list(_loss_lines(one))
    return {
        "title": one.arm, "file": path.name, "sentence": one.sentence, "density": one.total_density,
        "legend": [(line.name, line.colour, line.dotted) for line in lines],
        "curves": list(_curves(number, one, lines)), "maps": list(_maps(number, one)), "rows": _rows(one.cells),
        "reach": list(_reach(number, one)),
    }  # fmt: skip


def _loss_lines(one: Evaluation) -> Iterator[Line]:
    for arm, colour in COLOURS.items():
        for quantity, cut in (("loss", False), ("cut_loss", True)):
            reading = one.reading(quantity, arm)
            if reading is not None:
                name = f"{ARMS[arm]}{', context cut' if cut else ''}"
                yield Line(name=name, reading=reading, colour=colour, dotted=cut)


def _curves(number: int, one: Evaluation, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    if lines:
        title, figure = "Held-out loss by position", position_figure(lines, "nats per token")
        yield {"title": title, "figure": drawing(f"eval-{number}-loss", figure, title)}
    titles = {"cut_minus_whole": "what the loss rises by when the context is cut, nats",
              "kl": "divergence of next tokens from dense attention's, nats"}  # fmt: skip
    for quantity, title in titles.items():
        found = [
            Line(name=ARMS[arm], reading=reading, colour=ORANGE if quantity == "kl" else COLOURS[arm])
            for arm in COLOURS
            if (reading := one.reading(quantity, arm)) is not None
        ]
        if found:
            figure = position_figure(found, "nats per token")
            yield {"title": title[0].upper() + title[1:],
                   "figure": drawing(f"eval-{number}-{quantity}", figure, f"{title}, by position")}  # fmt: skip


def _maps(number: int, one: Evaluation) -> Iterator[dict[str, Any]]:
    kinds: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in one.cells:
        if cell.depth_from is not None:
            kinds.setdefault((cell.planted, cell.question, cell.arm), []).append(cell)
    for (planted, question, arm), cells in kinds.items():
        needles = "one needle" if planted == 1 else f"{planted} needles"
        title = f"{needles} a sequence, {PLACES.get(question, question)}, {ARMS.get(arm, arm)}"
        name = f"eval-{number}-needle-{planted}-{question}-{arm}"
        yield {"title": title, "figure": drawing(name, needle_figure(cells), f"Needles found: {title}")}


def _rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a row for all depths of each kind of question."""
    groups: dict[tuple[str, int, int, str, str], list[Cell]] = {}
    for one in cells:
        groups.setdefault((one.task, one.planted, one.length_tokens, one.question, one.arm), []).append(one)
    return [
        {
            "task": TASKS.get(task, task), "planted": planted, "length": short_tokens(length),
            "question": PLACES.get(question, question).removeprefix("the question stands "), "arm": arm,
            "found": sum(one.found for one in own), "asked": sum(one.asked for one in own),
            "low": own[0].low if len(own) == 1 else None, "high": own[0].high if len(own) == 1 else None,
        }
        for (task, planted, length, question, arm), own in groups.items()
    ]  # fmt: skip


def _reach(number: int, one: Evaluation) -> Iterator[dict[str, Any]]:
    for far in dict.fromkeys(far for layer in one.reach for far in layer.unattended):
        if any(layer.unattended.get(far) for layer in one.reach):
            title = f"keys that no query more than {int(far):,} tokens later attends"
            figure = drawing(f"eval-{number}-reach-{far}", reach_figure(one.reach, far), f"Share of {title}")
            yield {"title": f"Share of {title}", "figure": figure}
