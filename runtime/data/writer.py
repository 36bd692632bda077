"""Making a data folder: text, JSON lines or token arrays to token shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError, did_you_mean, shown
from ...traces.files import read_bytes, sealed, sha256_of_bytes, write_atomically, write_json
from ...traces.progress import Progress, no_progress
from .shards import DOCUMENTS_NAME, MANIFEST_NAME, DataManifest, TokenShard, TokenType

SHARD_TOKENS = 1 << 27
MAX_FILE_BYTES = 16 << 30
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
    shard_tokens: int = SHARD_TOKENS, progress: Progress = no_progress,
) -> DataManifest:  # fmt: skip
    """Write all documents of the inputs, in order, into a new data folder and return its manifest.

    inputs: text files (one document each), .jsonl files (one a line, in `text_field`), .npy files of token ids (one
    document each), or folders of these, walked in the order of names. Raises InputError when there is nothing, when a
    file cannot be used, or when the folder holds something already.
    """
    is_there = folder.exists()
    if is_there and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("is not empty" if folder.is_dir() else "is no folder", source=folder)
    try:
        return _write_all(inputs, folder, tokenizer, text_field, shard_tokens, progress)
    except BaseException:  # also Ctrl-C: a folder without a manifest is of no use
        for left in (*folder.glob("tokens-*.bin"), folder / DOCUMENTS_NAME):
            left.unlink(missing_ok=True)
        with suppress(OSError):
            if not is_there:
                folder.rmdir()
        raise


def _write_all(
    inputs: Sequence[Path], folder: Path, tokenizer: Tokenizer, text_field: str, shard_tokens: int, progress: Progress
) -> DataManifest:
    files, vocabulary = list(_files(inputs)), tokenizer.vocabulary
    sizes: tuple[TokenType, ...] = ("uint8", "uint16", "uint32")
    dtype: TokenType = next(name for name in sizes if vocabulary - 1 <= np.iinfo(name).max)
    starts: list[int] = []
    shards: list[TokenShard] = []
    waiting: list[NDArray[Any]] = []
    tokens = written = 0
    for number, path in enumerate(files):
        for ids in _documents(path, tokenizer, text_field):
            if not ids.size:
                continue
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
        documents_sha256=sha256_of_bytes(places), shards=shards,
    )  # fmt: skip
    # The manifest's digest stands for those of the files too, which it holds.
    write_json(folder / MANIFEST_NAME, sealed(manifest.model_dump(mode="json")))
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
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"is no array of tokens ({error})", source=path) from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"must be one row of whole numbers, not {ids.dtype} of shape {ids.shape}", source=path)
    return ids.astype(np.int64)


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"is no JSON ({error})", source=path, field=f"line {number}") from error
            yield _text_of(record, text_field, source=path, field=f"line {number}")


def _text_of(record: Any, text_field: str, *, source: Path, field: str) -> str:
    if not isinstance(record, dict):
        raise InputError(f"is no JSON object with text in {text_field!r}: {shown(record)}", source=source, field=field)
    if text_field not in record:
        near = did_you_mean(text_field, record)
        told = f"is no JSON object with text in {text_field!r} (--text-field): it has {', '.join(record)}{near}"
        raise InputError(told, source=source, field=field)
    if not isinstance(record[text_field], str):
        raise InputError(f"{text_field!r} is no text", source=source, field=field)
    return record[text_field]


def _write_shard(folder: Path, number: int, documents: list[NDArray[Any]]) -> TokenShard:
    tokens = np.concatenate(documents)
    data, name = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes(), f"tokens-{number:05d}.bin"
    write_atomically(folder / name, data)
    return TokenShard(file=name, tokens=tokens.size, sha256=sha256_of_bytes(data))
