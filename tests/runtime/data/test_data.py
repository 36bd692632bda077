"""Token shards: what goes in comes out, every epoch is a permutation, nothing altered is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsering.cli import app
from sparsering.runtime.data.shards import TokenData, sequence_index
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.runtime.train.batch import cut
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.setup import set_up
from sparsering.traces.errors import InputError
from sparsering.traces.files import sealed
from train_runs import write_run

TEXTS = [b"first document", b"second, with \xff a byte that is no text", b"third"]
ALL = b"\0".join(TEXTS) + b"\0"


def _data(folder: Path, **keywords: Any) -> TokenData:
    (folder / "in").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / f"in/{number}.txt").write_bytes(text)
    write_data([folder / "in"], folder / "out", byte_tokenizer(), **keywords)
    return TokenData.open(folder / "out")


@pytest.mark.parametrize("shard_tokens", [1, 20, 1 << 20])
def test_what_goes_in_comes_out(shard_tokens: int, tmp_path: Path) -> None:
    data = _data(tmp_path, shard_tokens=shard_tokens)
    data.verify()
    assert data.tokens == len(ALL)
    read = b"".join(bytes(data.sequence(i, 10).tokens.tolist()) for i in range(data.sequences(10)))
    assert read == ALL[: len(ALL) // 10 * 10]
    second = data.sequence(1, 10)  # tokens 10 … 19: the first document ends with token 14
    assert second.documents.tolist() == [0] * 5 + [1] * 5


def test_json_lines_and_token_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    np.save(tmp_path / "b.npy", np.array([7, 8, 9]))
    result = CliRunner().invoke(
        app, ["data", str(tmp_path), "-o", str(tmp_path / "out"), "--text-field", "body", "--json"]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures["documents"], figures["tokens"], figures["vocabulary"]) == (3, 11, 256)
    assert bytes(TokenData.open(tmp_path / "out").sequence(0, 11).tokens.tolist()) == b"one\0two\0\7\x08\t"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "a.jsonl: line 2"),
        ("a.jsonl", b'{"other": "x"}\n', "line 1: is no JSON object with text in 'text'"),
        ("a.npy", b"not an array", "a.npy: is no array of tokens"),
        ("a.txt", None, "no such file"),
    ],
)
def test_unusable_input_is_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = CliRunner().invoke(app, ["data", str(tmp_path / name), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 256]))
    with pytest.raises(InputError, match="token 256 of a vocabulary of 256"):
        write_data([tmp_path / "a.npy"], tmp_path / "out", byte_tokenizer())


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin", "manifest.json"])
def test_altered_and_truncated_files_are_refused(name: str, tmp_path: Path) -> None:
    path = _data(tmp_path).folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=name):
        TokenData.open(path.parent).verify()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match=name):
        TokenData.open(path.parent).verify()


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_a_file_that_is_listed_twice_is_refused(tokens: int, tmp_path: Path) -> None:
    """What the first entry says of it would be compared with nothing, and believed."""
    path = _data(tmp_path).folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["shards"].insert(0, raw["shards"][0] | {"tokens": tokens})
    path.write_text(json.dumps(sealed({name: value for name, value in raw.items() if name != "digest"})))
    with pytest.raises(InputError, match=r"manifest\.json: shards: names a file twice"):
        TokenData.open(path.parent)


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    data = _data(tmp_path)
    with pytest.raises(InputError, match="is not empty"):
        write_data([tmp_path / "in"], data.folder, byte_tokenizer())


@given(count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = [sequence_index(epoch * count + place, count=count, seed=seed) for place in range(count)]
    assert sorted(order) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = [[sequence_index(e * 100 + i, count=100, seed=s) for i in range(100)] for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != sorted(orders[0])


def test_a_step_sees_the_same_sequences_whatever_the_shape_of_the_run(tmp_path: Path) -> None:
    data = _data(tmp_path)
    as_replicas = [data.at_step(1, slot, slots=2, seq_len_tokens=9, seed=3).index for slot in range(2)]
    as_steps = [data.at_step(step, 0, slots=1, seq_len_tokens=9, seed=3).index for step in (2, 3)]
    assert as_replicas == as_steps


def test_document_boundaries_in_labels_and_positions(tmp_path: Path) -> None:
    asked = {"loss": True, "positions": True}
    raw = write_run(tmp_path / "run", seq_len_tokens=20, data={"documents": asked, "folder": str(tmp_path / "out")})
    data = _data(tmp_path)
    setup = set_up(parse_config(raw))
    got: dict[int, tuple[int, int]] = {}
    for rank in range(2):
        part = cut(setup.config, data.sequence(0, 20), setup.plan, rank=rank, device=torch.device("cpu"))
        places = setup.plan.make_placement().positions(rank).tolist()
        columns = part.position_ids[0].tolist(), part.labels[0].tolist()
        for place, token, label in zip(places, *columns, strict=True):
            got[place] = (token, label)
    ids = list(ALL[:20])
    for place in range(20):
        position = place if place < 15 else place - 15
        label = -100 if place in (14, 19) else ids[place + 1]  # the end of a document, the end of the sequence
        assert got[place] == (position, label), place
