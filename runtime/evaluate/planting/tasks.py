"""What is planted and asked: needles, chains of variables, a word that stands most often. Drawn by seed and number.

Variable tracking and the most frequent word are after RULER (Hsieh et al., arXiv 2404.06654), with one answer each.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from ...data.writer import Tokenizer
from .sequence import Asked, Frame, Insert, Planted, QuestionPlace, asked_tokens, ids_of, planted
from .words import KEYS, NOUNS

FREQUENT_SHARE = 0.1  # of a list's words are the one that is asked for


@dataclass(frozen=True, kw_only=True)
class Making:
    """What every kind of sequence is made from.

    text: ordinary tokens, int64, at least as many as the sequence has. random: of this sequence.
    """

    tokenizer: Tokenizer
    text: Tensor
    length: int
    place: QuestionPlace
    random: Random

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text."""
        return ids_of(self.tokenizer, text)

    def framed(self, inserts: list[Insert], asked: list[Asked]) -> Planted:
        """Return the sequence."""
        closing = self.ids(".")
        frame = Frame(length=self.length, place=self.place, asked=asked_tokens(asked, closing))
        return planted(self.text, inserts, asked, frame, closing=closing)


Maker = Callable[[Making, int], Planted]  # of a sequence, and its number among those of its kind


@dataclass(frozen=True, kw_only=True)
class Needles:
    """`The secret number of <key> is <seven digits>.`, at depths of their own, each asked for once in shuffled order.

    The needles of sequence j are for the ranges of depth j * count, j * count + 1, … modulo `depths`, drawn within.
    """

    count: int
    depths: int

    def __call__(self, making: Making, number: int) -> Planted:
        """Make one sequence."""
        random, inserts, asked = making.random, [], []
        for place, key in enumerate(random.sample(KEYS, self.count)):
            depth = (number * self.count + place) % self.depths
            question = making.ids(f"\nThe secret number of {key} is")
            answer = making.ids(f" {random.randrange(10**6, 10**7)}")
            inserts.append(
                Insert(place=(depth + random.random()) / self.depths, ids=question + answer + making.ids(".\n"))
            )
            asked.append(Asked(question=question, answer=answer, depth=depth))
        random.shuffle(asked)
        return making.framed(inserts, asked)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Chains `VAR ABC = 12345`, `VAR DEF = VAR ABC`, …, mixed with each other; the last variable's value is asked."""

    chains: int
    hops: int

    def __call__(self, making: Making, number: int) -> Planted:
        """Make one sequence."""
        random = making.random
        names = _different(
            random, self.chains * self.hops, lambda: "".join(random.choices(string.ascii_uppercase, k=3))
        )
        values = _different(random, self.chains, lambda: str(random.randrange(10**4, 10**5)))
        inserts, asked = [], []
        for chain, value in enumerate(values):
            own = names[chain * self.hops : (chain + 1) * self.hops]
            told = [value, *(f"VAR {name}" for name in own)]
            for place, name, what in zip(sorted(random.random() for _ in own), own, told, strict=False):
                ids = making.ids(f"\nVAR {name} =") + making.ids(f" {what}") + making.ids(".\n")
                inserts.append(Insert(place=place, ids=ids))
            asked.append(Asked(question=making.ids(f"\nThe value of VAR {own[-1]} is"), answer=making.ids(f" {value}")))
        random.shuffle(asked)
        return making.framed(inserts, asked)


@dataclass(frozen=True, kw_only=True)
class FrequentWord:
    """A list of words, of which a tenth are one word and the rest drawn evenly from others; that word is asked for."""

    def __call__(self, making: Making, number: int) -> Planted:
        """Make one sequence: ordinary text, as much as the list leaves over, then the list, then the question."""
        random, closing = making.random, making.ids(".")
        frequent = random.choice(NOUNS)
        others = [word for word in NOUNS if word != frequent]
        question = making.ids("\nThe word that stands most often in the list is")
        asked = [Asked(question=question, answer=making.ids(f" {frequent}"))]
        frame = Frame(length=making.length, place=making.place, asked=asked_tokens(asked, closing))
        words = {word: making.ids(f" {word}") for word in NOUNS}
        room = frame.before - len(head := making.ids("\nA list of words:"))
        count = room // max(map(len, words.values()))
        often = max(2, round(count * FREQUENT_SHARE))
        drawn = [frequent] * often + [others[place % len(others)] for place in range(max(count - often, 0))]
        random.shuffle(drawn)
        row = [*head, *(token for word in drawn for token in words[word])]
        return planted(making.text, [Insert(place=1.0, ids=tuple(row))], asked, frame, closing=closing)


def making_of(tokenizer: Tokenizer, text: Tensor, *, length: int, place: QuestionPlace, seed: str) -> Making:
    """Return what one sequence is made from. seed: of all that is drawn for it."""
    return Making(tokenizer=tokenizer, text=text.to(torch.int64), length=length, place=place, random=Random(seed))


def _different(random: Random, count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
