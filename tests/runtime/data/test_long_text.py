"""`sparsering data` for long text: folders as documents, what is held out, files that are no UTF-8, many processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from interrupts import Command, started
from sparsering.cli import app
from sparsering.runtime.data.reading import Wanted
from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.data.writer import Outputs, Shape, byte_tokenizer, model_tokenizer, write_folders
from sparsering.traces.errors import InputError
from train_runs import write_text

TREE = {
    "b/2.c": b"two",
    "b/1.h": b"one\n",
    "b/deep/3.c": b"three",
    "b/notes.jsonl": b'{"text": "x"}\n{"text": "y"}\n',
    "b/picture.png": b"no text",
    "a.txt": b"top",
    "c/4.rst": b"four",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer, trained on the texts of training tests."""
    folder = tmp_path_factory.mktemp("model")
    texts = sorted(write_text(folder / "text").glob("*.txt"))
    own = ByteLevelBPETokenizer()
    own.train([str(text) for text in texts], vocab_size=600, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in TREE.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


def _documents(folder: Path) -> list[bytes]:
    """The documents of a folder of bytes."""
    data = TokenData.open(folder)
    data.verify()
    text = bytes(data.sequence(0, data.tokens).tokens.tolist())
    ends = np.cumsum(data.document_tokens()).tolist()
    return [text[end - size : end] for end, size in zip(ends, data.document_tokens().tolist(), strict=True)]


def _invoked(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *(str(one) for one in arguments)])
    return result.exit_code, result.output


def test_texts_of_a_folder_are_one_document(tree: Path, tmp_path: Path) -> None:
    code, output = _invoked(tree, "-o", tmp_path / "out", "--join", "folders")
    assert code == 0, output
    wanted = [b"top\n\0", b"one\n\ntwo\n\0", b"x\0", b"y\0", b"three\n\0", b"four\n\0"]
    assert _documents(tmp_path / "out") == wanted


def test_without_it_a_file_is_a_document(tree: Path, tmp_path: Path) -> None:
    assert _invoked(tree, "-o", tmp_path / "out")[0] == 0
    wanted = [b"top\0", b"one\n\0", b"two\0", b"x\0", b"y\0", b"three\0", b"four\0"]
    assert _documents(tmp_path / "out") == wanted


def test_suffixes_replace_the_usual_ones(tree: Path, tmp_path: Path) -> None:
    assert _invoked(tree, "-o", tmp_path / "out", "--suffix", ".png", "--suffix", "4.rst")[0] == 0
    assert _documents(tmp_path / "out") == [b"x\0", b"y\0", b"no text\0", b"four\0"]


def test_what_is_held_out_goes_to_a_folder_of_its_own(tree: Path, tmp_path: Path) -> None:
    code, output = _invoked(
        tree, "-o", tmp_path / "out", "--join", "folders", "--hold-out", "b/deep/*", "--hold-out", "b/1.h",
        "--held-out-output", tmp_path / "held", "--json",
    )  # fmt: skip
    assert code == 0, output
    assert _documents(tmp_path / "out") == [b"top\n\0", b"two\n\0", b"x\0", b"y\0", b"four\n\0"]
    assert _documents(tmp_path / "held") == [b"one\n\n\0", b"three\n\0"]
    assert json.loads(output)["held_out"]["documents"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hold-out", "b/*"], "--hold-out: goes with --held-out-output"),
        (["--held-out-output", "held"], "--held-out-output: goes with --hold-out"),
        (["--hold-out", "x/*", "--held-out-output", "held"], "--hold-out: 'x/*' matches no file of the inputs"),
        (["--hold-out", "*", "--held-out-output", "held"], "out: the inputs hold no token for it"),
        (["--hold-out", "b/*", "--held-out-output", "out"], "is another folder that is to be written"),
        (["--hold-out", "b/*", "--held-out-output", "out/in"], "is another folder that is to be written"),
        (["--hold-out", "b/*", "--held-out-output", "full"], "full: is not empty"),
        (["--join", "files"], "--join: 'files' is not one of none, folders"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    options: list[str], message: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    code, output = _invoked(tree, "-o", "out", *options)
    assert (code, len(output.strip().splitlines())) == (2, 1), output
    assert message in output
    assert sorted(tmp_path.rglob("*")) == before


def test_where_the_first_folder_cannot_take_its_place_the_second_is_not_there(tree: Path, tmp_path: Path) -> None:
    """Somebody writes into one of them while it is made."""
    out, held = tmp_path / "out", tmp_path / "held"

    def meddles(stage: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "file").touch()

    with pytest.raises(InputError, match="out: is not empty"):
        write_folders([tree], Outputs(folder=out, held_out=held), byte_tokenizer(),
                      wanted=Wanted(hold_out=("c/*",)), shape=Shape(), progress=meddles)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_files_that_are_no_utf_8_are_refused_or_counted(tree: Path, model: Path, tmp_path: Path) -> None:
    (tree / "b/0.c").write_bytes(b"/* M\xfcller */")
    (tree / "b/5.c").symlink_to("nowhere")
    code, output = _invoked(tree, "-o", tmp_path / "out", "--tokenizer", model)
    assert code == 2
    assert "0.c: is no UTF-8 (byte 4)" in output
    code, output = _invoked(tree, "-o", tmp_path / "out", "--tokenizer", model, "--skip-unreadable")
    assert code == 0, output
    assert f"2 files were left out, the first: {tree / 'b/0.c'}" in output
    assert TokenData.open(tmp_path / "out").documents == 7
    (tree / "b/5.c").unlink()
    assert _invoked(tree, "-o", tmp_path / "bytes")[0] == 0  # bytes are bytes
    assert TokenData.open(tmp_path / "bytes").documents == 8


def test_a_document_is_the_ids_of_its_files_one_by_one(tree: Path, model: Path, tmp_path: Path) -> None:
    assert _invoked(tree / "b", "-o", tmp_path / "out", "--tokenizer", model, "--join", "folders")[0] == 0
    own = PreTrainedTokenizerFast.from_pretrained(model)
    ids = [token for text in ("one\n\n", "two\n") for token in own.encode(text, add_special_tokens=False)]
    size = len(ids) + 1
    assert TokenData.open(tmp_path / "out").sequence(0, size).tokens.tolist() == [*ids, own.eos_token_id]


def _written(folder: Path, inputs: Sequence[Path], model: Path, workers: int) -> dict[str, bytes]:
    outputs = Outputs(folder=folder / "out", held_out=folder / "held")
    wanted = Wanted(join="folders", hold_out=("*/3/*",))
    shape = Shape(shard_tokens=20_000, align_tokens=64, workers=workers, alone_bytes=0)
    write_folders(inputs, outputs, model_tokenizer(model), wanted=wanted, shape=shape)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written_does_not_depend_on_the_number_of_processes(model: Path, tmp_path: Path) -> None:
    """Files and folders of many sizes, lines and arrays; batches of all processes hold parts of several documents."""
    source = tmp_path / "in/tree"
    for number in range(6):
        write_text(source / str(number), documents=1 + number, bytes_each=20_000 * (1 + number % 3))
    (source / "lines.jsonl").write_text("".join(json.dumps({"text": f"ring plan {n}"}) + "\n" for n in range(3000)))
    np.save(source / "2/ids.npy", np.arange(250))
    alone = _written(tmp_path / "1", [source.parent], model, 1)
    assert len(alone) > 6  # shards of both folders
    for workers in (2, 3):
        assert _written(tmp_path / str(workers), [source.parent], model, workers) == alone


def test_a_mistake_in_the_midst_of_many_processes_is_one_line(model: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "in", documents=12, bytes_each=500_000)
    (tmp_path / "in/9.txt").write_bytes(b"\xff")
    code, output = _invoked(tmp_path / "in", "-o", tmp_path / "out", "--tokenizer", model, "--workers", 2)
    assert (code, len(output.strip().splitlines())) == (2, 1), output
    assert "9.txt: is no UTF-8 (byte 0)" in output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def _workers(command: Command) -> list[int]:
    return [one for one in command.processes() if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def _at_work(command: Command) -> bool:
    """Whether both workers were told what they are: before that, Python says so itself when nobody tells them."""
    return sum("numpy" in Path(f"/proc/{one}/maps").read_text() for one in _workers(command)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "worker killed", "killed"])
def test_whatever_ends_it_no_process_and_no_half_folder_is_left(how: str, model: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "in", documents=40, bytes_each=1_000_000)
    arguments = f"data in -o out --tokenizer {model} --workers 2"
    with started(arguments, tmp_path) as command:
        command.wait_for(_at_work)
        if how == "Ctrl-C":
            command.interrupt()
        else:
            number = _workers(command)[0] if how == "worker killed" else command.process.pid
            os.kill(number, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        code, _, stderr = command.end()
        assert command.processes() == []
    wanted = {"Ctrl-C": 130, "SIGTERM": 143, "worker killed": 2, "killed": -signal.SIGKILL}
    assert code == wanted[how], stderr
    lines = {"Ctrl-C": "sparsering: interrupted\n", "worker killed": "sparsering: --workers: a process that"}
    assert stderr.startswith(lines.get(how, "")), stderr
    assert len(stderr.splitlines()) == (how in lines), stderr
    left = [path.name for path in tmp_path.iterdir() if how != "killed" or not path.name.endswith(".partial")]
    assert left == ["in"]
