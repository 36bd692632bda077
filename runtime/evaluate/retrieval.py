"""Asking about what was planted: sequence by sequence, each question counted in its cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...traces.progress import Progress
from ..data.shards import TokenData, sequence_index
from ..data.writer import Tokenizer
from .planting.sequence import QUESTION_PLACES, Planted, QuestionPlace
from .planting.tasks import FrequentWord, Maker, Needles, Tracking, making_of
from .result import Arm, Cell, wilson
from .settings import AGGREGATION, NEEDLE, TRACKING, EvaluationSettings

TRIED = 8  # sequences of a series, before any work
BestTokens = Callable[[Arm, Tensor, Tensor], Tensor]  # of an arm, ids [S] and some rows: int64 [S], see Runner.best


@dataclass(frozen=True, kw_only=True)
class Series:
    """Sequences of one kind, length and place of the questions. planted: how many things each has; count: of them."""

    task: str
    planted: int
    depths: int | None
    length: int
    place: QuestionPlace
    count: int
    make: Maker

    def sequence(self, number: int, *, text: Tensor, tokenizer: Tokenizer, seed: int) -> Planted:
        """Return one of them. text: int64, ordinary tokens, at least as many."""
        told = f"{seed}/{self.task}/{self.planted}/{self.length}/{self.place}/{number}"
        return self.make(making_of(tokenizer, text, length=self.length, place=self.place, seed=told), number)


def series_of(settings: EvaluationSettings) -> list[Series]:
    """Return everything that is planted and asked, in the order of tasks, numbers planted, lengths and places."""
    found: list[Series] = []
    for task, planted, depths, asked_each, make in _kinds(settings):
        wanted = settings.keys * (depths or 1)
        for length in settings.planted_lengths:
            for place in QUESTION_PLACES:
                found.append(Series(
                    task=task, planted=planted, depths=depths, length=length, place=place,
                    count=-(-wanted // asked_each), make=make,
                ))  # fmt: skip
    return found


def require_room(settings: EvaluationSettings, tokenizer: Tokenizer) -> None:
    """Make a few sequences of every series, of zeros as text. InputError where what is planted has no room."""
    for series in series_of(settings):
        for number in range(min(series.count, TRIED)):
            text = torch.zeros(series.length, dtype=torch.int64)
            series.sequence(number, text=text, tokenizer=tokenizer, seed=settings.seed)


def _kinds(settings: EvaluationSettings) -> Iterator[tuple[str, int, int | None, int, Maker]]:
    """Yield task, how many things are planted, ranges of depth, questions a sequence, and what makes sequences."""
    for task in settings.tasks:
        if task == NEEDLE:
            for count in settings.needles:
                yield task, count, settings.depths, count, Needles(count=count, depths=settings.depths)
        elif task == TRACKING:
            yield task, settings.chains, None, settings.chains, Tracking(chains=settings.chains, hops=settings.hops)
        elif task == AGGREGATION:
            yield task, 1, None, 1, FrequentWord()


def ask(
    best: BestTokens, arms: Sequence[Arm], data: TokenData, tokenizer: Tokenizer, settings: EvaluationSettings,
    progress: Progress,
) -> tuple[Cell, ...]:  # fmt: skip
    """Return the cells of all that is planted and asked. Ordinary text is the data's sequences of each length."""
    cells: list[Cell] = []
    every = series_of(settings)
    total, done = sum(one.count for one in every) * len(arms), 0
    for series in every:
        there = data.sequences(series.length)
        counted: dict[Arm, Counter[tuple[int | None, bool]]] = {arm: Counter() for arm in arms}
        for number in range(series.count):
            place = sequence_index(number, count=there, seed=settings.seed)
            text = torch.from_numpy(data.sequence(place, series.length).tokens)
            made = series.sequence(number, text=text, tokenizer=tokenizer, seed=settings.seed)
            rows = torch.cat([torch.arange(one.first - 1, one.first - 1 + one.tokens) for one in made.answers])
            for arm in arms:
                hits = made.found(best(arm, made.ids, rows))
                counted[arm].update((one.depth, hit) for one, hit in zip(made.answers, hits, strict=True))
                done += 1
                progress("asking", done, total)
        for arm in arms:
            cells += _cells(series, arm, counted[arm])
    return tuple(cells)


def _cells(series: Series, arm: Arm, counted: Counter[tuple[int | None, bool]]) -> Iterator[Cell]:
    for depth in range(series.depths) if series.depths else (None,):
        found = counted[depth, True]
        asked = found + counted[depth, False]
        low, high = wilson(found, asked)
        limits = (None, None) if depth is None else (depth / (series.depths or 1), (depth + 1) / (series.depths or 1))
        yield Cell.model_validate({
            "task": series.task, "arm": arm, "planted": series.planted, "length_tokens": series.length,
            "question": series.place, "depth_from": limits[0], "depth_until": limits[1], "asked": asked, "found": found,
            "share": found / asked, "low": low, "high": high,
        })  # fmt: skip
