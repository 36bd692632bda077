"""Making a data folder: text, JSON lines or token arrays to token shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...traces.dataset.whole_folder import whole_folders
from ...traces.errors import InputError
from ...traces.files import sealed, sha256_of_bytes, write_atomically, write_json
from ...traces.progress import Progress, no_progress
from .reading import Found, Piece, Reader, Skipped, Wanted
from .shards import DOCUMENTS_NAME, MANIFEST_NAME, DataManifest, TokenShard, TokenType
from .workers import Tokenised, tokenised

SHARD_TOKENS = 1 << 27
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids. name: for the manifest; vocabulary: ids are below it; separator: appended to every document.

    encode_text: ids of a text; None: its bytes. Several processes can use it if it can be pickled.
    """

    name: str
    vocabulary: int
    separator: int | None = None
    encode_text: Encode | None = None

    def encode(self, text: bytes) -> NDArray[np.int64]:
        """Return the ids of a text, which is UTF-8 unless bytes are tokens. The separator is not among them."""
        encode = self.encode_text
        ids = np.frombuffer(text, np.uint8) if encode is None else np.asarray(encode(text.decode()))
        return ids.astype(np.int64)

    @property
    def dtype(self) -> TokenType:
        """The smallest type of numbers that holds every id."""
        sizes: tuple[TokenType, ...] = ("uint8", "uint16", "uint32")
        return next(name for name in sizes if self.vocabulary - 1 <= np.iinfo(name).max)


@dataclass(frozen=True)
class _ModelText:
    """The ids that a tokenizer of transformers gives to a text. Processes that it is sent to need no torch."""

    own: Any

    def __call__(self, text: str) -> Sequence[int]:
        encoded = self.own(text, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
        return encoded["input_ids"]


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token; documents end with a zero byte."""
    return Tokenizer("byte", 256, 0)


def model_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a local model folder; InputError when there is none."""
    from ..model.load import read_tokenizer

    own = read_tokenizer(folder)
    return Tokenizer(folder.name, len(own), own.eos_token_id, _ModelText(own))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How documents lie in a data folder, and who does the work.

    align_tokens: every document begins at a multiple of it; what is left before the next one is filled with the
    separator, or 0. workers: processes that tokenise; what is written is the same for any number of them. alone_bytes:
    inputs of no more are tokenised by this process alone, as others would still start.
    """

    shard_tokens: int = SHARD_TOKENS
    align_tokens: int = 1
    workers: int = 1
    alone_bytes: int = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The new data folders. held_out: for what `Wanted.hold_out` matches; it is there if and only if that is given."""

    folder: Path
    held_out: Path | None = None

    def all(self) -> list[Path]:
        """Return both, or the one."""
        return [self.folder] if self.held_out is None else [self.folder, self.held_out]


def write_data(
    inputs: Sequence[Path], folder: Path, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS,
    align_tokens: int = 1,
) -> DataManifest:  # fmt: skip
    """Write all documents of the inputs, in order, into a new data folder and return its manifest.

    inputs: text files (one document each), .jsonl files (one a line, in `text`), .npy files of token ids (one document
    each), or folders of these, walked in the order of names. Raises InputError when there is nothing, when a file
    cannot be used, or when the folder holds something already. `write_folders` can do more.
    """
    shape = Shape(shard_tokens=shard_tokens, align_tokens=align_tokens)
    written = write_folders(inputs, Outputs(folder=folder), tokenizer, wanted=Wanted(), shape=shape)
    return written.manifests[0]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written: a manifest for each folder of `Outputs.all()`; and what was left out."""

    manifests: list[DataManifest]
    skipped: Skipped


def write_folders(
    inputs: Sequence[Path], outputs: Outputs, tokenizer: Tokenizer, *, wanted: Wanted, shape: Shape,
    progress: Progress = no_progress,
) -> Written:  # fmt: skip
    """Write the documents of the inputs into one new data folder, or into two; there is none of them, or all.

    inputs: see `write_data`. Raises InputError as that does, and where a worker was killed.
    """
    reader = Reader(wanted=wanted, needs_characters=tokenizer.encode_text is not None)
    files = reader.files(inputs)
    workers = shape.workers if reader.needs_characters and _bytes_of(files) > shape.alone_bytes else 1
    pieces = _pieces(reader, files, progress)
    with whole_folders(*outputs.all()) as folders:
        shards = [_Shards(folder, tokenizer, shape) for folder in folders]
        with tokenised(pieces, tokenizer.encode, workers) as stream:
            _write_documents(stream, shards)
        manifests = [one.finish(output) for one, output in zip(shards, outputs.all(), strict=True)]
    return Written(manifests=manifests, skipped=reader.skipped)


def _bytes_of(files: Sequence[Found]) -> int:
    return sum(file.path.stat().st_size for file in files if file.path.is_file())


def _pieces(reader: Reader, files: Sequence[Found], progress: Progress) -> Iterator[Piece]:
    for number, file in enumerate(files, start=1):
        yield from reader.pieces(file)
        progress("reading", number, len(files))


def _write_documents(stream: Tokenised, shards: Sequence[_Shards]) -> None:
    for _, parts in groupby(stream, key=lambda part: part[0].key):
        pieces, ids = zip(*parts, strict=True)
        file, is_text = pieces[0].file, isinstance(pieces[0].content, bytes)
        shards[file.held_out].add(np.concatenate(ids), is_text=is_text, source=file)


@dataclass
class _Shards:
    """Writes a data folder, document by document."""

    folder: Path
    tokenizer: Tokenizer
    shape: Shape
    tokens: int = 0
    starts: list[int] = field(default_factory=list)
    shards: list[TokenShard] = field(default_factory=list)
    waiting: list[NDArray[Any]] = field(default_factory=list)

    def add(self, ids: NDArray[np.int64], *, is_text: bool, source: Found) -> None:
        """Add a document and the padding behind it; nothing for one without tokens."""
        tokenizer = self.tokenizer
        if is_text and tokenizer.separator is not None:
            ids = np.append(ids, tokenizer.separator)
        if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocabulary):
            told = f"has token {ids.max()} of a vocabulary of {tokenizer.vocabulary}"
            raise InputError(told, source=source.path)
        self._append(ids)
        self._append(np.full(-ids.size % self.shape.align_tokens, tokenizer.separator or 0))

    def finish(self, output: Path) -> DataManifest:
        """Write what is left, and the manifest. output: the folder's name in the end; InputError where it has nothing.

        The manifest's digest stands for those of the files too, which it holds. Versions that know no alignment read
        what has none.
        """
        self._write_shard()
        if not self.shards:
            raise InputError("the inputs hold no token for it", source=output)
        places = np.asarray(self.starts, dtype="<i8").tobytes()
        write_atomically(self.folder / DOCUMENTS_NAME, places)
        manifest = DataManifest(
            tokenizer=self.tokenizer.name, vocabulary=self.tokenizer.vocabulary, dtype=self.tokenizer.dtype,
            documents=len(self.starts), documents_sha256=sha256_of_bytes(places),
            align_tokens=self.shape.align_tokens, shards=self.shards,
        )  # fmt: skip
        unaligned = {"align_tokens"} if manifest.align_tokens == 1 else set()
        write_json(self.folder / MANIFEST_NAME, sealed(manifest.model_dump(mode="json", exclude=unaligned)))
        return manifest

    def _append(self, ids: NDArray[np.int64]) -> None:
        if ids.size:
            self.starts.append(self.tokens)
            self.tokens += ids.size
            self.waiting.append(ids.astype(np.dtype(self.tokenizer.dtype).newbyteorder("<")))
        if self.tokens - sum(one.tokens for one in self.shards) >= self.shape.shard_tokens:
            self._write_shard()

    def _write_shard(self) -> None:
        if self.waiting:
            tokens, name = np.concatenate(self.waiting), f"tokens-{len(self.shards):05d}.bin"
            data = tokens.tobytes()
            write_atomically(self.folder / name, data)
            self.shards.append(TokenShard(file=name, tokens=tokens.size, sha256=sha256_of_bytes(data)))
            self.waiting = []
