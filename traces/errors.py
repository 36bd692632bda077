"""The one home of errors that a user can cause. Everything here ends a command with exit code 2 and one line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

MAX_SHOWN_CHARACTERS = 60
MAX_FIELD_CHARACTERS = 120
# What a terminal obeys or what hides other text: control characters but tab and newline, marks that turn the direction
# of writing; and halves of characters, which cannot be written at all.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


MAX_PLACE_CHARACTERS, MAX_PROBLEM_CHARACTERS = 600, 1300  # of a message: values of a file may be of any length


class InputError(ValueError):
    """Input that cannot be used: names the file (or argument), the field and the offending value in one line.

    The command line prints the message alone and exits with code 2; library callers can catch it as a ValueError.
    """

    def __init__(self, problem: str, *, source: str | Path | None = None, field: str | None = None) -> None:
        where = ": ".join(str(part) for part in (source, field) if part is not None).replace("\n", "\\n")
        message = shortened(" ".join(problem.split()), MAX_PROBLEM_CHARACTERS)
        where = shortened(where, MAX_PLACE_CHARACTERS)
        super().__init__(printable(f"{where}: {message}" if where else message))
        self.source = None if source is None else str(source)
        self.field = field


class UnsupportedError(InputError):
    """A valid request that this version does not carry out, said before any work is done."""


class ScheduleError(AssertionError):
    """A schedule that breaks a rule of `planner.check.check`; the message names rank, phase and the object."""


def unknown_name(
    value: object, known: Collection[str], *, source: str | Path | None = None, field: str | None = None
) -> InputError:
    """Return the error for a name that is none of `known`: it lists them, and asks whether the nearest was meant."""
    problem = f"{shown(value)} is not one of {', '.join(known)}{did_you_mean(value, known)}"
    return InputError(problem, source=source, field=field)


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'ring'?" for a misspelt name, nothing where no name is near."""
    by_lower_case = {name.lower(): name for name in known}
    nearest = get_close_matches(str(value).lower(), by_lower_case, n=1, cutoff=0.65)
    return f"; did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""


def field_name(place: Iterable[str | int]) -> str:
    """Return the keys that lead to a value as one short printable name: `gpu.memory_bytes`."""
    parts = (str(part) for part in place)
    return shortened(".".join(part if part.isprintable() else repr(part) for part in parts), MAX_FIELD_CHARACTERS)


def printable(text: str) -> str:
    """Return the text with its control characters written out, as \\x1b, so that no terminal obeys them."""
    return CONTROL.sub(lambda odd: odd[0].encode("unicode_escape", "surrogatepass").decode(), text)


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long: a large one is not written out to be cut."""
    return shortened(repr(_beginning(value)), MAX_SHOWN_CHARACTERS)


def _beginning(value: object, level: int = 0) -> object:
    """Return a value of JSON without what would not be shown anyway; others as they are."""
    most = MAX_SHOWN_CHARACTERS if level < 2 else 2 if level < 8 else 1
    if type(value) is str:
        return value[: 2 * MAX_SHOWN_CHARACTERS]
    if type(value) is list:
        return [_beginning(one, level + 1) for one in value[:most]]
    if type(value) is tuple:
        return tuple(_beginning(one, level + 1) for one in value[:most])
    if type(value) is dict:
        return {_beginning(key): _beginning(one, level + 1) for key, one in islice(value.items(), most)}
    return value


def shortened(text: str, most: int) -> str:
    """Return the text, its end replaced by dots where it has more than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."
