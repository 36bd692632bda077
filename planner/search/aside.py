"""Forward of candidates, scored by a second process while this one scores backward.

Whatever forward needs, schedules, their events and the work of layers, lives in the second process. Both compute the
same functions of the same problem, so what a search finds does not hang on whether there is a second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ...traces.errors import InputError
from ..cost.evaluation import Evaluator
from ..layouts.layout import Layout
from ..resting import no_collections
from ..spawned import Spawned, spawned
from .candidates import PlacementChoice
from .problem import Problem
from .scores import Rater, Score, ScoreBoard


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A candidate whose forward is to be scored; without a rater: to be let go of."""

    choice: PlacementChoice
    layout: Layout
    rater: str = ""
    samples: tuple[int, ...] = ()


class ForwardScorer:
    """Scores forward in the second process, in the order in which it is asked. Raises InputError if that is killed."""

    def __init__(self, process: Spawned) -> None:
        self._connection = process.connection

    def begin(self, problem: Problem, evaluators: Mapping[str, Evaluator]) -> None:
        """Say what is planned, and who evaluates, by the names of raters; both can be pickled."""
        self._send((problem, dict(evaluators)))

    def ask(self, choice: PlacementChoice, layout: Layout, rater: Rater) -> None:
        """Have one candidate scored; every question has one answer."""
        self._send(_Asked(choice=choice, layout=layout, rater=rater.name, samples=rater.samples))

    def answer(self) -> Score:
        """Wait for the next score, and return it; what the second process raised is raised here."""
        try:
            told = self._connection.recv()
        except (EOFError, OSError) as error:
            raise _killed() from error
        if isinstance(told, Exception):
            raise told
        return told

    def forget(self, choice: PlacementChoice, layout: Layout) -> None:
        """Let go of a candidate's schedule."""
        self._send(_Asked(choice=choice, layout=layout))

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise _killed() from error


@contextmanager
def forward_scorer(*, wanted: bool) -> Iterator[ForwardScorer | None]:
    """Start the second process, which ends with the block; None where it is not wanted."""
    if not wanted:
        yield None
        return
    process = spawned(_work)
    try:
        yield ForwardScorer(process)
    finally:
        process.end()


def _work(connection: Connection) -> None:
    """Score what is asked until the other side is closed or gone."""
    try:
        problem, evaluators = connection.recv()
        board = ScoreBoard(problem=problem)
        with no_collections():
            while True:
                asked: _Asked = connection.recv()
                if asked.rater:
                    connection.send(_scored(board, evaluators[asked.rater], asked))
                else:
                    board.forget(asked.choice, asked.layout)
    except (EOFError, OSError):
        return


def _scored(board: ScoreBoard, evaluator: Evaluator, asked: _Asked) -> Score | Exception:
    rater = Rater(name=asked.rater, evaluator=evaluator, samples=asked.samples)
    try:
        return board.score(asked.choice, asked.layout, "forward", rater)
    except Exception as error:  # raised where it is read
        return error


def _killed() -> InputError:
    problem = "the second process was killed; nothing was written. One process needs less memory"
    return InputError(problem, field="--processes")
