"""Samples: every one is whole, is told of, and is found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsering.cli import app
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from sparsering.traces.samples.located import SAMPLES, located, sample_names

MAX_BYTES = 5_000_000


def test_a_name_stands_for_its_folder_and_other_paths_for_themselves(tmp_path: Path) -> None:
    assert located("sample:real-135m") == SAMPLES / "real-135m"
    assert located(Path("sample:real-135m")) == SAMPLES / "real-135m"
    assert located(tmp_path) == tmp_path


def test_a_misspelt_sample_is_one_line_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^sample:real-135: 'real-135' is not one of .*did you mean 'real-135m'\?$"):
        Trace.open("sample:real-135")
    done = CliRunner().invoke(app, ["inspect", "sample:"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "real-135m" in done.stderr


@pytest.mark.parametrize("name", sample_names())
def test_every_sample_is_whole(name: str) -> None:
    trace = Trace.open(f"sample:{name}")
    trace.verify()
    assert trace.unlisted_parts == ()
    assert trace.header.origin == ("real" if name.startswith("real-") else "synthetic")


def test_samples_are_small_and_told_of() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.suffix != ".pyc") <= MAX_BYTES
    text = (SAMPLES / "README.md").read_text()
    assert [name for name in sample_names() if f"## {name}\n" not in text] == []
    assert text.count("\n## ") == len(sample_names())


def test_the_real_sample_holds_every_head_and_what_it_keeps() -> None:
    trace = Trace.open("sample:real-135m")
    rows = trace.heads(0)
    assert (len(rows), trace.header.seq_len_tokens, trace.header.model.layers) == (270, 8192, 30)
    assert all(0.0 < (row.choice.kept_mass_sampled or 0.0) <= 1.0 for row in rows)


def test_the_packed_sample_has_documents() -> None:
    documents = Trace.open("sample:packed-documents").documents(0)
    assert documents is not None and len(documents) == 131072 and documents.max() > 4
