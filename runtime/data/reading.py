"""What `sparsering data` reads: files of its inputs, in order, as pieces of documents."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError, did_you_mean, shortened, shown
from ...traces.files import open_regular, read_bytes
from ...traces.strict_json import require_small

MAX_FILE_BYTES = 16 << 30
MAX_LINE_BYTES = 128 << 20
MAX_TOLD_CHARACTERS = 160
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".tex")
OTHER_SUFFIXES = (".jsonl", ".npy")
BETWEEN_FILES = b"\n"  # follows every file of a document that is joined of several
Join = Literal["none", "folders"]


class Found(NamedTuple):
    """One file. document: its number, the same for files that are joined; held_out: for the other data folder."""

    path: Path
    document: int
    held_out: bool


class Piece(NamedTuple):
    """A document, or a part of one: consecutive pieces of the same key are parts of one document.

    key: number of the file's document, and the line of a .jsonl file, else 0. content: text as bytes, of a document
    that a separator ends; or ids as they are.
    """

    file: Found
    key: tuple[int, int]
    content: bytes | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is read of the inputs, and how.

    text_field: where the text of a JSON line is. suffixes: how names of text files within folders end. join: "none",
    a file is a document; "folders": the text files that lie directly in one folder are. hold_out: patterns of paths
    below an input, `*` standing for slashes too, of files that go to the other data folder. skip_unreadable: files that
    cannot be read, or are no UTF-8 where characters matter, are left out and counted, not refused.
    """

    text_field: str = "text"
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    join: Join = "none"
    hold_out: tuple[str, ...] = ()
    skip_unreadable: bool = False


@dataclass(kw_only=True)
class Skipped:
    """How many files were left out, and why the first was."""

    files: int = 0
    first: str | None = None

    def add(self, error: InputError) -> None:
        """Count a file."""
        self.files += 1
        self.first = self.first or str(error)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the inputs. needs_characters: text must be UTF-8, as the tokenizer takes characters, not bytes."""

    wanted: Wanted
    needs_characters: bool
    skipped: Skipped = field(default_factory=Skipped)

    def files(self, inputs: Sequence[Path]) -> list[Found]:
        """Return all files in order; InputError for an input that is not there, and a pattern that holds out nothing.

        Of files that would be joined, those that are held out make a document of their own, behind the others'.
        """
        found = list[Found]()
        used, document = set[str](), 0
        for top in inputs:
            for group in self._groups(top):
                matches = {path: self._patterns(path, top) for path in group}
                for held_out in (False, True):
                    part = [path for path in group if bool(matches[path]) == held_out]
                    found += (Found(path, document, held_out) for path in part)
                    document += bool(part)
                used.update(*matches.values())
        for pattern in self.wanted.hold_out:
            if pattern not in used:
                raise InputError(f"{shown(pattern)} matches no file of the inputs", field="--hold-out")
        return found

    def pieces(self, file: Found) -> Iterator[Piece]:
        """Yield what a file holds; nothing, and one more is counted, of a file that is skipped."""
        path = file.path
        try:
            with open_regular(path):
                pass  # refused if it is none
            content = self._text(path) if path.suffix not in OTHER_SUFFIXES else b""
        except InputError as error:
            if not self.wanted.skip_unreadable:
                raise
            self.skipped.add(error)
            return
        if path.suffix == ".jsonl":
            lines = enumerate(_json_lines(path, self.wanted.text_field))
            yield from (Piece(file, (file.document, number), text.encode()) for number, text in lines)
        else:
            yield Piece(file, (file.document, 0), _token_array(path) if path.suffix == ".npy" else content)

    def _groups(self, top: Path) -> Iterator[list[Path]]:
        """Yield the files of each document: one, or all texts of a folder."""
        if top.is_file():
            yield [top]
        elif not top.is_dir():
            raise InputError("no such file or folder", source=top)
        for place, folders, names in os.walk(top):  # nothing for a file
            folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
            paths = [Path(place) / name for name in sorted(names) if name.endswith(self._endings)]
            texts = [path for path in paths if path.suffix not in OTHER_SUFFIXES]
            if self.wanted.join == "folders" and texts:
                yield texts
                paths = [path for path in paths if path.suffix in OTHER_SUFFIXES]
            yield from ([path] for path in paths)

    @property
    def _endings(self) -> tuple[str, ...]:
        return (*self.wanted.suffixes, *OTHER_SUFFIXES)

    def _patterns(self, path: Path, top: Path) -> set[str]:
        """Return the patterns that hold a file out."""
        relative = path.name if path == top else path.relative_to(top).as_posix()
        return {pattern for pattern in self.wanted.hold_out if fnmatch.fnmatchcase(relative, pattern)}

    def _text(self, path: Path) -> bytes:
        text = read_bytes(path, max_bytes=MAX_FILE_BYTES)
        if self.needs_characters:
            try:
                text.decode()
            except UnicodeDecodeError as error:
                told = f"is no UTF-8 (byte {error.start}): convert it, or leave such files out with --skip-unreadable"
                raise InputError(told, source=path) from error
        return text + BETWEEN_FILES if self.wanted.join == "folders" else text


def _token_array(path: Path) -> NDArray[np.int64]:
    try:
        ids = np.load(path, allow_pickle=False, mmap_mode="r")  # mapped: a header that lies asks for no memory
    except Exception as error:  # numpy's reader of headers raises what it comes upon
        problem = f"is no array of tokens ({shortened(str(error), MAX_TOLD_CHARACTERS)})"
        raise InputError(problem, source=path) from error
    if not isinstance(ids, np.ndarray):
        raise InputError("is an archive of arrays, not one array of tokens", source=path)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"must be one row of whole numbers, not {ids.dtype} of shape {ids.shape}", source=path)
    return ids.astype(np.int64)


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            field = f"line {number}"
            if not line.strip():
                continue
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"has more than the {MAX_LINE_BYTES} bytes that are read", source=path, field=field)
            require_small(line, f"{path}: {field}")
            try:  # others wrote these lines: NaN beside the text or a key given twice does no harm
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"is no JSON ({error})", source=path, field=field) from error
            text = _text_of(record, text_field, source=path, field=field)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{text_field!r} is no text ({error.reason})", source=path, field=field) from error
            yield text


def _text_of(record: Any, text_field: str, *, source: Path, field: str) -> str:
    if not isinstance(record, dict):
        raise InputError(f"is no JSON object with text in {text_field!r}: {shown(record)}", source=source, field=field)
    if text_field not in record:
        near = did_you_mean(text_field, record)
        has = shortened(", ".join(record), MAX_TOLD_CHARACTERS)
        told = f"is no JSON object with text in {text_field!r} (--text-field): it has {has}{near}"
        raise InputError(told, source=source, field=field)
    if not isinstance(record[text_field], str):
        raise InputError(f"{text_field!r} is no text", source=source, field=field)
    return record[text_field]
