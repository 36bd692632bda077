"""Nothing that a command did not write itself is overwritten, and a wrong output is told before any work is done."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sparsering import cli
from sparsering.traces.errors import InputError
from sparsering.traces.files import require_output, write_json
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace

SETTINGS = SyntheticSettings(seq_len_tokens=2048, block_size=128, heads=2, columns=16, density=0.2)
PLAN = ("plan", "--trace", "trace", "--cluster", "local-cpu-4", "--layout", "ring", "--placement", "striped")
SIMULATE = ("simulate", "plan.json", "--trace", "trace", "--cluster", "local-cpu-4")
RUN = ("run", "plan.json", "--trace", "trace")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def refusal(*arguments: str) -> str:
    """The one line that a command ends with."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("sparsering: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace, a plan, a timeline, and files of the user."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_synthetic_trace(Path("trace"), "vertical-slash", SETTINGS, layers=1, steps=1, kv_heads=1, head_dim=16)
        assert invoke(*PLAN, "--dtype", "float32", "--backend", "blockwise", "-o", "plan.json").exit_code == 0
        assert invoke(*SIMULATE, "-o", "timeline.json.gz").exit_code == 0
        Path("notes.txt").write_text("mine\n")
        Path("other.json").write_text('{"mine": 1}')
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((*PLAN, "-o", "trace/manifest.json"), "trace/manifest.json: exists and is no plan: it is not overwritten"),
        ((*PLAN, "-o", "timeline.json.gz"), "timeline.json.gz: exists and is no plan: it is not overwritten"),
        ((*PLAN, "-o", "trace"), "trace: cannot be written: is a folder"),
        ((*PLAN, "-o", "/dev/null"), "/dev/null: cannot be written: is no regular file"),
        ((*SIMULATE, "-o", "plan.json"), "plan.json: exists and is no timeline: it is not overwritten"),
        ((*SIMULATE, "-o", "notes.txt"), "notes.txt: exists and is no timeline: it is not overwritten"),
        ((*SIMULATE, "-o", "other.json"), "other.json: exists and is no timeline: it is not overwritten"),
        ((*SIMULATE, "-o", "notes.txt/t.json"), "notes.txt/t.json: cannot be written: notes.txt is no folder"),
        ((*RUN, "-o", "plan.json"), "plan.json: exists and is no timeline: it is not overwritten"),
        ((*RUN, "-o", "trace"), "trace: cannot be written: is a folder"),
        (("data", "notes.txt", "-o", "plan.json"), "plan.json: exists and is no folder"),
        (("data", "notes.txt", "-o", "trace"), "trace: is not empty: it holds 'manifest.json'"),
    ],
)
def test_what_is_there_stays(
    folder: Path, arguments: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert refusal(*arguments) == problem
    assert contents(folder) == before


def test_an_older_output_of_the_same_kind_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = Path("timeline.json.gz").read_bytes()
    assert invoke(*SIMULATE, "--jitter", "0.5", "-o", "timeline.json.gz").exit_code == 0
    assert Path("timeline.json.gz").read_bytes() != before
    assert invoke(*SIMULATE, "-o", "timeline.json.gz").exit_code == 0
    assert Path("timeline.json.gz").read_bytes() == before


def test_an_empty_file_may_be_filled_and_a_missing_one_made(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing", "no/such/folder/missing"):
        require_output(tmp_path / name, kind="plan", key="placement")
    write_json(tmp_path / "list", [1])
    with pytest.raises(InputError, match="list: exists and is no plan"):
        require_output(tmp_path / "list", kind="plan", key="placement")


def test_a_device_is_refused_once_not_by_every_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert refusal(*RUN, "--device", "tpu") == "device: 'tpu' is not one of cpu, cuda; did you mean 'cpu'?"
    assert refusal(*RUN, "--device", "cuda") == "device: the plan is for 4 ranks, this host has 3 GPUs"


def test_a_tokenizer_that_is_not_there_is_not_looked_for_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("nowhere", "trace", "notes.txt"):
        wanted = f"{name}: tokenizer: holds no tokenizer"
        assert refusal("data", "notes.txt", "-o", "data", "--tokenizer", name) == wanted


def test_what_our_own_checks_say_is_said_plainly(tmp_path: Path) -> None:
    """Not behind pydantic's "Value error", and not before the whole document."""
    shape = ("--heads", "5", "--kv-heads", "2")
    assert refusal("synthesize", "dense", "-o", str(tmp_path / "t"), *shape) == "heads 5 is no multiple of kv_heads 2"
    config = tmp_path / "config.yaml"
    config.write_text("{model: {path: m}, data: {folder: d}, seq_len_tokens: 64, steps: 1, dtype: float16}\n")
    wanted = f"{config}: dtype 'float16' cannot be trained in: no loss scaling here"
    assert refusal("train", str(config), "--dry-run") == wanted
