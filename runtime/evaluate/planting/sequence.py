"""Sequences with something planted in ordinary text, and questions about it that have one right answer.

A question and its answer both stand in the sequence, as if the model had been asked and had answered: one forward pass
shows of every token of every answer whether the model would have said it (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ....traces.errors import InputError
from ...data.writer import Tokenizer

QuestionPlace = Literal["last", "mid"]
QUESTION_PLACES: tuple[QuestionPlace, ...] = ("last", "mid")
MID_SHARE = 3, 4  # where in a sequence questions begin that do not stand last, or earlier
TRAILING_TOKENS = 256  # of ordinary text after these, at least


@dataclass(frozen=True, kw_only=True)
class Insert:
    """Token ids that go into the text; place: after which share of it, from 0 to 1."""

    place: float
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question and its answer as token ids. depth: which range of depths it is about; None: that is not asked."""

    question: tuple[int, ...]
    answer: tuple[int, ...]
    depth: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where an answer stands: its first token in the sequence, and how many it has."""

    first: int
    tokens: int
    depth: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """ids int64 [S] and the answers in it, in order."""

    ids: Tensor
    answers: tuple[Answer, ...]

    def found(self, best: Tensor) -> list[bool]:
        """Return of each answer whether all its tokens are the best ones, int64 [S], of the token before each."""
        hits = []
        for one in self.answers:
            told = best[one.first - 1 : one.first - 1 + one.tokens]
            hits.append(bool((told == self.ids[one.first : one.first + one.tokens]).all()))
        return hits


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Room for a sequence: how many tokens stand before the questions and after them.

    length: of the sequence; place: of the questions, at its end, or at three quarters and TRAILING_TOKENS before the
    end; asked: tokens of all of them and their answers.
    """

    length: int
    place: QuestionPlace
    asked: int

    def __post_init__(self) -> None:
        if 4 * self.before < self.length:
            told = f"{self.asked} tokens of questions do not fit into a sequence of {self.length}"
            raise InputError(f"{told}: ask fewer a sequence, or have longer ones", field="lengths")

    @property
    def before(self) -> int:
        """Tokens before the first question."""
        room, (share, of) = self.length - self.asked, MID_SHARE
        return room if self.place == "last" else min(share * self.length // of, room - TRAILING_TOKENS)

    @property
    def after(self) -> int:
        """Tokens after the last answer."""
        return self.length - self.before - self.asked


def asked_tokens(asked: Sequence[Asked], closing: Sequence[int]) -> int:
    """Return how many tokens questions and answers take, with what closes all but the last."""
    return sum(len(one.question) + len(one.answer) for one in asked) + (len(asked) - 1) * len(closing)


def planted(
    text: Tensor, inserts: Sequence[Insert], asked: Sequence[Asked], frame: Frame, *, closing: Sequence[int]
) -> Planted:
    """Return ordinary text, at least frame.length int64 tokens, with inserts and questions in it; exactly that long.

    closing: ids that stand after each answer but the last. InputError where the inserts have no room.
    """
    taken = sum(len(one.ids) for one in inserts)
    ordinary = frame.before - taken
    if ordinary < 0 or text.shape[0] < ordinary + frame.after:
        told = f"{taken} tokens do not fit before the questions of a sequence of {frame.length}"
        raise InputError(told, field="lengths")
    row: list[int] = []
    done = 0
    for one in sorted(inserts, key=lambda one: one.place):
        until = min(int(one.place * ordinary), ordinary)
        row += [*text[done:until].tolist(), *one.ids]
        done = until
    row += text[done:ordinary].tolist()
    answers = []
    for number, one in enumerate(asked):
        row += [*(closing if number else ()), *one.question]
        answers.append(Answer(first=len(row), tokens=len(one.answer), depth=one.depth))
        row += one.answer
    row += text[ordinary : ordinary + frame.after].tolist()
    assert len(row) == frame.length
    return Planted(ids=torch.tensor(row, dtype=torch.int64), answers=tuple(answers))


def ids_of(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the token ids of a text, nothing added to them."""
    encode = tokenizer.encode_text
    return tuple(text.encode()) if encode is None else tuple(int(one) for one in encode(text))
