"""Making a data folder: text, JSON lines or token arrays to token shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...traces.dataset.whole_folder import whole_folder
from ...traces.errors import InputError, did_you_mean, shortened, shown
from ...traces.files import open_regular, read_bytes, sealed, sha256_of_bytes, write_atomically, write_json
from ...traces.progress import Progress, no_progress
from ...traces.strict_json import require_small
from .shards import DOCUMENTS_NAME, MANIFEST_NAME, DataManifest, TokenShard, TokenType

SHARD_TOKENS = 1 << 27
MAX_FILE_BYTES = 16 << 30
MAX_LINE_BYTES = 128 << 20
MAX_TOLD_CHARACTERS = 160
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".tex")
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids. name: for the manifest; vocabulary: ids are below it; separator: appended to every document.

    encode_text: ids of a text; None: its bytes.
    """

    name: str
    vocabulary: int
    separator: int | None = None
    encode_text: Encode | None = None

    def encode(self, text: bytes) -> NDArray[np.int64]:
        """Return the ids of one document."""
        encode = self.encode_text
        ids = np.frombuffer(text, np.uint8) if encode is None else np.asarray(encode(text.decode(errors="replace")))
        ids = ids.astype(np.int64)
        return ids if self.separator is None else np.append(ids, self.separator)


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token; documents end with a zero byte."""
    return Tokenizer("byte", 256, 0)


def model_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a local model folder; InputError when there is none."""
    from ..model.load import read_tokenizer

    own = read_tokenizer(folder)
    return Tokenizer(folder.name, len(own), own.eos_token_id, lambda text: own.encode(text, add_special_tokens=False))


def write_data(
    inputs: Sequence[Path], folder: Path, tokenizer: Tokenizer, *, text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS, align_tokens: int = 1, progress: Progress = no_progress,
) -> DataManifest:  # fmt: skip
    """Write all documents of the inputs, in order, into a new data folder and return its manifest.

    inputs: text files (one document each), .jsonl files (one a line, in `text_field`), .npy files of token ids (one
    document each), or folders of these, walked in the order of names. align_tokens: every document begins at a multiple
    of it; what is left before the next one is filled with the separator, or 0. Raises InputError when there is nothing,
    when a file cannot be used, or when the folder holds something already.
    """
    with whole_folder(folder) as working:
        return _write_all(_Reading(inputs, tokenizer, text_field, align_tokens), working, shard_tokens, progress)


@dataclass(frozen=True)
class _Reading:
    inputs: Sequence[Path]
    tokenizer: Tokenizer
    text_field: str
    align_tokens: int

    def documents(self, path: Path) -> Iterator[NDArray[np.int64]]:
        """The ids of one document of a file after the other, none of them empty, and of the padding behind it."""
        for ids in _documents(path, self.tokenizer, self.text_field):
            if ids.size:
                yield ids
            if missing := -ids.size % self.align_tokens:
                yield np.full(missing, self.tokenizer.separator or 0, dtype=np.int64)


def _write_all(reading: _Reading, folder: Path, shard_tokens: int, progress: Progress) -> DataManifest:
    files, tokenizer = list(_files(reading.inputs)), reading.tokenizer
    vocabulary = tokenizer.vocabulary
    sizes: tuple[TokenType, ...] = ("uint8", "uint16", "uint32")
    dtype: TokenType = next(name for name in sizes if vocabulary - 1 <= np.iinfo(name).max)
    starts: list[int] = []
    shards: list[TokenShard] = []
    waiting: list[NDArray[Any]] = []
    tokens = written = 0
    for number, path in enumerate(files):
        for ids in reading.documents(path):
            if ids.min() < 0 or ids.max() >= vocabulary:
                raise InputError(f"has token {ids.max()} of a vocabulary of {vocabulary}", source=path)
            starts.append(tokens)
            tokens += ids.size
            waiting.append(ids.astype(dtype))
            if tokens - written >= shard_tokens:
                shards.append(_write_shard(folder, len(shards), waiting))
                waiting, written = [], tokens
        progress("reading", number + 1, len(files))
    if waiting:
        shards.append(_write_shard(folder, len(shards), waiting))
    if not shards:
        raise InputError("the inputs hold no token", field="inputs")
    places = np.asarray(starts, dtype="<i8").tobytes()
    write_atomically(folder / DOCUMENTS_NAME, places)
    manifest = DataManifest(
        tokenizer=tokenizer.name, vocabulary=vocabulary, dtype=dtype, documents=len(starts),
        documents_sha256=sha256_of_bytes(places), align_tokens=reading.align_tokens, shards=shards,
    )  # fmt: skip
    # The manifest's digest stands for those of the files too, which it holds. Versions that know no alignment read
    # what has none.
    unaligned = {"align_tokens"} if manifest.align_tokens == 1 else set()
    write_json(folder / MANIFEST_NAME, sealed(manifest.model_dump(mode="json", exclude=unaligned)))
    return manifest


def _files(inputs: Iterable[Path]) -> Iterator[Path]:
    for path in inputs:
        if path.is_file():
            yield path
        elif not path.is_dir():
            raise InputError("no such file or folder", source=path)
        for place, folders, names in os.walk(path):  # nothing for a file
            folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
            for name in sorted(names):
                if name.endswith((*TEXT_SUFFIXES, ".jsonl", ".npy")):
                    yield Path(place) / name


def _documents(path: Path, tokenizer: Tokenizer, text_field: str) -> Iterator[NDArray[np.int64]]:
    if path.suffix == ".npy":
        yield _token_array(path)
    elif path.suffix == ".jsonl":
        yield from (tokenizer.encode(text.encode()) for text in _json_lines(path, text_field))
    else:
        yield tokenizer.encode(read_bytes(path, max_bytes=MAX_FILE_BYTES))


def _token_array(path: Path) -> NDArray[np.int64]:
    with open_regular(path):
        pass  # refused if it is none
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


def _write_shard(folder: Path, number: int, documents: list[NDArray[Any]]) -> TokenShard:
    tokens = np.concatenate(documents)
    data, name = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes(), f"tokens-{number:05d}.bin"
    write_atomically(folder / name, data)
    return TokenShard(file=name, tokens=tokens.size, sha256=sha256_of_bytes(data))
