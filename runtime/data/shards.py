"""Training data: memory-mapped token shards with digests, cut into sequences of the training length.

A folder holds `tokens-*.bin` (little-endian unsigned integers), `documents.bin` (int64 first token of each document)
and `manifest.json`, which vouches for them. The corpus is one long row of tokens: sequence i is tokens
[i * S, (i + 1) * S). Where documents are aligned, each begins at a multiple of so many tokens, and what fills the rest
before the next one is padding: an entry among documents that begins elsewhere. Which sequence a training step sees is
a pure function of (step, slot, seed): nothing about the order is stored, so nothing about it can be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ...traces.dataset.manifest import parse_model
from ...traces.errors import InputError
from ...traces.files import read_sealed, sha256_of_file

DATA_SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
DOCUMENTS_NAME = "documents.bin"
MAX_MANIFEST_BYTES = 16 << 20
MAX_MANIFEST_VALUES = 1 << 20
MAX_ALIGN_TOKENS = 1 << 20
FEISTEL_ROUNDS = 4
TokenType = Literal["uint8", "uint16", "uint32"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenShard(_Record):
    """One file of tokens."""

    file: str = Field(pattern=r"^tokens-[0-9]{5}\.bin$")
    tokens: int = Field(ge=1)
    sha256: Sha256


class DataManifest(_Record):
    """What `sparsering data` wrote. tokenizer: "byte" or a description; vocabulary: ids are below it.

    documents: entries of `documents.bin`; align_tokens: all that begin at no multiple of it are padding.
    """

    schema_version: Literal[1] = DATA_SCHEMA_VERSION
    kind: Literal["sparsering-data"] = "sparsering-data"
    tokenizer: str
    vocabulary: int = Field(ge=1, le=1 << 32)
    dtype: TokenType
    documents: int = Field(ge=1)
    documents_sha256: Sha256
    align_tokens: int = Field(default=1, ge=1, le=MAX_ALIGN_TOKENS)
    shards: list[TokenShard] = Field(min_length=1)
    digest: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """One training sequence. tokens int64 [S]; documents int32 [S], counted from 0, padding among them.

    padding: bool [S], tokens that only fill blocks up; None where nothing is aligned.
    """

    index: int
    tokens: NDArray[np.int64]
    documents: NDArray[np.int32]
    padding: NDArray[np.bool_] | None = None


class PackedDocuments(NamedTuple):
    """All documents as sequences cut them, in order, int64 [documents]: sequence, first token in it, tokens."""

    sequence: NDArray[np.int64]
    first: NDArray[np.int64]
    tokens: NDArray[np.int64]


class TokenData:
    """A data folder opened for reading. Use `TokenData.open`."""

    def __init__(self, folder: Path, manifest: DataManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._ends = np.cumsum([shard.tokens for shard in manifest.shards])
        self.tokens = int(self._ends[-1])  # of all shards

    @classmethod
    def open(cls, folder: Path) -> TokenData:
        """Read the manifest and check that every file is there in full length; InputError in one line."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise InputError("is no data folder: it holds no manifest.json (see `sparsering data`)", source=folder)
        raw = read_sealed(path, newest_schema=DATA_SCHEMA_VERSION, max_bytes=MAX_MANIFEST_BYTES,
                      max_values=MAX_MANIFEST_VALUES)  # fmt: skip
        data = cls(folder, parse_model(DataManifest, raw, source=path))
        item_bytes = np.dtype(data.manifest.dtype).itemsize
        sizes = {shard.file: shard.tokens * item_bytes for shard in data.manifest.shards}
        if len(sizes) < len(data.manifest.shards):
            raise InputError("names a file twice", source=path, field="shards")
        for name, size_bytes in (sizes | {DOCUMENTS_NAME: data.manifest.documents * 8}).items():
            try:
                actual = (folder / name).stat().st_size
            except OSError as error:
                told = f"is listed in the manifest and cannot be read: {error.strerror}"
                raise InputError(told, source=folder / name) from error
            if actual != size_bytes:
                told = f"is {actual} bytes, the manifest says {size_bytes}"
                raise InputError(told, source=folder / name, field="bytes")
        return data

    @property
    def documents(self) -> int:
        """How many documents there are, padding not counted."""
        return int((self._starts % self.manifest.align_tokens == 0).sum())

    def document_tokens(self) -> NDArray[np.int64]:
        """Return how many tokens each document has, padding left out."""
        lengths = np.diff(np.append(self._starts, self.tokens))
        return lengths[self._starts % self.manifest.align_tokens == 0]

    def sequences(self, seq_len_tokens: int) -> int:
        """Return how many whole sequences there are; InputError when there is none."""
        if self.tokens < seq_len_tokens:
            told = f"holds {self.tokens} tokens, a sequence has {seq_len_tokens}"
            raise InputError(told, source=self.folder, field="tokens")
        return self.tokens // seq_len_tokens

    def verify(self) -> None:
        """Compare every file with its digest; InputError names the first that was altered."""
        wanted = {shard.file: shard.sha256 for shard in self.manifest.shards}
        for name, digest in (wanted | {DOCUMENTS_NAME: self.manifest.documents_sha256}).items():
            actual = sha256_of_file(self.folder / name)
            if actual != digest:
                raise InputError(f"is {actual}, the manifest says {digest}", source=self.folder / name, field="sha256")

    def sequence(self, index: int, seq_len_tokens: int) -> TokenSequence:
        """Return sequence `index` of the corpus."""
        assert 0 <= index < self.sequences(seq_len_tokens)
        start, stop = index * seq_len_tokens, (index + 1) * seq_len_tokens
        document = np.searchsorted(self._starts, np.arange(start, stop), side="right")
        documents, align = (document - document[0]).astype(np.int32), self.manifest.align_tokens
        padding = None if align == 1 else self._starts[document - 1] % align != 0
        return TokenSequence(index=index, tokens=self._read(start, stop), documents=documents, padding=padding)

    def packed(self, seq_len_tokens: int) -> PackedDocuments:
        """Return the documents of all sequences, padding among them."""
        end = self.sequences(seq_len_tokens) * seq_len_tokens
        cuts = np.union1d(self._starts[self._starts < end], np.arange(0, end, seq_len_tokens))
        lengths = np.diff(np.append(cuts, end))
        return PackedDocuments(cuts // seq_len_tokens, cuts % seq_len_tokens, lengths)

    def at_step(self, step: int, slot: int, *, slots: int, seq_len_tokens: int, seed: int) -> TokenSequence:
        """Return the sequence of one of the `slots` (microbatch, replica) of a training step."""
        count = self.sequences(seq_len_tokens)
        return self.sequence(sequence_index(step * slots + slot, count=count, seed=seed), seq_len_tokens)

    def _read(self, start: int, stop: int) -> NDArray[np.int64]:
        parts: list[NDArray[Any]] = []
        for shard, end in zip(self._shards, self._ends, strict=True):
            first = int(end) - shard.size
            if first < stop and start < end:
                parts.append(shard[max(start - first, 0) : stop - first])
        tokens = np.concatenate(parts).astype(np.int64)
        if tokens.max(initial=0) >= self.manifest.vocabulary:
            raise InputError(f"has token {tokens.max()} of {self.manifest.vocabulary}", source=self.folder)
        return tokens

    @cached_property
    def _shards(self) -> list[NDArray[Any]]:
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        return [np.memmap(self.folder / shard.file, dtype=dtype, mode="r") for shard in self.manifest.shards]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        starts = np.fromfile(self.folder / DOCUMENTS_NAME, dtype="<i8")
        if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= self.tokens:
            raise InputError("must ascend from 0 within the tokens", source=self.folder / DOCUMENTS_NAME)
        return starts


def sequence_index(number: int, *, count: int, seed: int) -> int:
    """Return which of `count` sequences is the `number`-th to be seen: every epoch is a permutation of its own.

    A Feistel network over the smallest even number of bits, walked until it lands below `count`.
    """
    epoch, place = divmod(number, count)
    half_bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    while True:
        place = _feistel(place, half_bits, f"{seed}/{epoch}")
        if place < count:
            return place


def _feistel(value: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for turn in range(FEISTEL_ROUNDS):
        mixed = int.from_bytes(sha256(f"{key}/{turn}/{right}".encode()).digest()[:8], "little")
        left, right = right, left ^ (mixed & mask)
    return left << half_bits | right
