"""Texts of other tools, as they come out of terminals and launchers: colours and labels of lines are taken off."""

from __future__ import annotations

import re
from pathlib import Path

from ...traces.errors import CONTROL, InputError
from ...traces.files import read_bytes

MAX_TEXT_BYTES = 1 << 24
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LABEL = re.compile(r"^(?:\[[\d,]+\]<std\w+>:|\s*\d+: )")  # of mpirun --tag-output and srun --label


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file; InputError when it cannot be read, is no UTF-8 or larger than 16 MiB."""
    try:
        text = read_bytes(path, max_bytes=MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 ({error.reason})", source=path) from error
    return lines_of(text)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without colours, labels and other control characters."""
    return [_LABEL.sub("", CONTROL.sub("", _COLOUR.sub("", line))) for line in text.splitlines()]
