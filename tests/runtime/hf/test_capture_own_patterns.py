"""Capture of models with patterns of their own, of packed documents, and of patterns by layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from model_cases import SEQ_LEN_TOKENS, case_config, case_model
from sparsering.cli import app
from sparsering.runtime.hf.capture import CaptureSettings, capture_model, trace_header
from sparsering.runtime.model.attached import ATTENTION_NAME
from sparsering.runtime.model.shape import model_body
from sparsering.runtime.pattern.selectors import make_selector
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.pattern import element_mask

BLOCK = 64


def ids_of(seed: int = 0, tokens: int = SEQ_LEN_TOKENS) -> torch.Tensor:
    """Return seeded token ids [S]."""
    return torch.randint(3, 250, (tokens,), generator=torch.Generator().manual_seed(seed))


SLASHES = {"columns": 9, "slashes": 5, "sink_tokens": 2, "window_tokens": 4}


def captured(folder: Path, model: Any, ids: torch.Tensor, **given: Any) -> Trace:
    """Capture one sequence, by default with XAttention, continuing densely."""
    documents = given.pop("documents", None)
    header = trace_header(model, model_id="case", seq_len_tokens=len(ids), block_size=BLOCK)
    selector = make_selector(*given.pop("selector", ("xattention", {"mass": 0.5})))
    with TraceWriter(folder, header) as writer:
        capture_model(model, ids, writer, CaptureSettings(selector=selector, **given), documents=documents)
    return Trace.open(folder)


def heard(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's last hidden states by its own attention."""
    with torch.no_grad():
        return model_body(model)(input_ids=ids[None], use_cache=False)[0][0]


class Told:
    """What the last layer's inputs were while a model was captured."""

    def __init__(self, model: Any) -> None:
        self.hidden = torch.zeros(0)
        self.hook = model_body(model).register_forward_hook(self._note)

    def _note(self, module: Any, given: Any, output: Any) -> None:
        self.hidden = output[0][0].detach()


@pytest.mark.parametrize(
    "name", ["gpt-oss", "gemma2", "gemma3-window", "llama4-chunks", "mistral-window", "olmo3", "gemma4", "mimo"]
)
def test_what_a_model_limits_is_recorded_and_attended(name: str, tmp_path: Path) -> None:
    """Dense layers stay dense, the model's own limits hold: hidden states are those of its own attention."""
    model = case_model(name, dtype=torch.float32)
    wanted = heard(model, ids_of())
    told = Told(model)
    trace = captured(tmp_path / "trace", model, ids_of())
    told.hook.remove()
    torch.testing.assert_close(told.hidden, wanted, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation != ATTENTION_NAME
    shape = trace.header.model
    for layer in trace.layers:
        rows = trace.layer_rows(0, layer)
        window, chunk = ((lengths or (0,) * shape.layers)[layer] for lengths in (shape.windows, shape.chunks))
        assert {row.choice.selector for row in rows} == {"model" if window or chunk else "xattention"}
        pattern = trace.layer_pattern(0, layer)
        distance = np.arange(SEQ_LEN_TOKENS)[:, None] - np.arange(SEQ_LEN_TOKENS)[None, :]
        if window:
            assert np.array_equal(element_mask(pattern, 0), (distance >= 0) & (distance < window))
        if chunk:  # the blocks that share a chunk: no fewer tokens than do
            of_chunk = np.arange(SEQ_LEN_TOKENS) // chunk
            attended = (of_chunk[:, None] == of_chunk[None, :]) & (distance >= 0)
            assert not (attended & ~element_mask(pattern, 0)).any()
            assert element_mask(pattern, 0).sum() < (distance >= 0).sum()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "selector", [("xattention", {"mass": 0.5}), ("vertical-slash", SLASHES)], ids=lambda one: one[0]
)
@pytest.mark.parametrize("name", ["llama", "gemma3-window", "gpt-oss"])
def test_packed_documents_are_captured_as_each_alone(
    name: str, selector: tuple[str, dict[str, Any]], sparse: bool, tmp_path: Path
) -> None:
    """Documents of whole blocks: patterns, kept mass and hidden states of each are what it has alone."""
    model = case_model(name, dtype=torch.float32)
    lengths, ids = (128, 64, 192), ids_of(1, 384)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    told = Told(model)
    packed = captured(tmp_path / "packed", model, ids, documents=documents, sparse=sparse, selector=selector)
    together, first = told.hidden, 0
    for number, length in enumerate(lengths):
        part, blocks = slice(first, first + length), slice(first // BLOCK, (first + length) // BLOCK)
        alone = captured(tmp_path / f"{number}", model, ids[part], sparse=sparse, selector=selector)
        torch.testing.assert_close(together[part], told.hidden, rtol=1e-4, atol=1e-4)
        for layer in packed.layers:
            both, own = packed.layer_pattern(0, layer), alone.layer_pattern(0, layer)
            for head in range(own.num_heads):
                at = both.heads[head].block_bits(both.num_blocks)[blocks, blocks]
                assert np.array_equal(at, own.heads[head].block_bits(own.num_blocks))
                columns = both.heads[head].columns
                columns = columns[(columns >= first) & (columns < first + length)] - first
                if length > BLOCK:  # of a block there is nothing to choose
                    assert np.array_equal(columns, own.heads[head].columns)
                pairs = packed.layer_rows(0, layer)[head].choice, alone.layer_rows(0, layer)[head].choice
                if pairs[0].kept_mass_documents is not None:
                    assert pairs[0].kept_mass_documents[number] == pytest.approx(pairs[1].kept_mass_probe, abs=1e-4)
        first += length
    told.hook.remove()
    chosen = [packed.layer_rows(0, layer)[0].choice for layer in packed.layers]
    chosen = [one for one in chosen if one.selector != "model"]
    assert chosen and all(len(one.kept_mass_documents or ()) == 3 for one in chosen)
    mean = np.average(chosen[0].kept_mass_documents or (), weights=[64, 64, 64])
    assert chosen[0].kept_mass_probe == pytest.approx(mean, abs=1e-6)
    found = packed.documents(0)
    assert found is not None
    assert np.array_equal(found, documents.numpy())


def test_documents_that_fall_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"documents: .*fall"):
        captured(tmp_path / "trace", case_model("llama"), ids_of(), documents=torch.arange(SEQ_LEN_TOKENS).flip(0))
    assert not (tmp_path / "trace/manifest.json").exists()


def test_the_command_takes_documents_and_patterns_by_layer(tmp_path: Path) -> None:
    case_config("gemma3-window").save_pretrained(tmp_path / "model")
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("ring plan token block mask " * (8 + number))
    (tmp_path / "patterns.yaml").write_text("selector: xattention\nlayers: [{layers: '1', selector: dense}]\n")
    command = ["capture", "--model", tmp_path / "model", "--random-weights", "--seq-len", 512, "--block-size", 64,
               "--documents", "--patterns", tmp_path / "patterns.yaml", "-o", tmp_path / "trace", *files]  # fmt: skip
    result = CliRunner().invoke(app, [str(one) for one in command])
    assert result.exit_code == 0, result.output
    trace = Trace.open(tmp_path / "trace")
    sizes = [len(file.read_bytes()) + 1 for file in files[:2]]
    found = trace.documents(0)
    assert found is not None
    assert np.flatnonzero(np.diff(found)).tolist() == [sizes[0] - 1, sum(sizes) - 1]
    kinds = [trace.layer_rows(0, layer)[0].choice for layer in trace.layers]
    assert [one.selector for one in kinds] == ["model", "sink-window", "model"]
    assert kinds[0].settings == {"window_tokens": 70}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--patterns", "p.yaml", "--settings", "s.json"], "--patterns: cannot be given beside --settings"),
        (["--patterns", "p.yaml", "--columns", "8"], r"--columns: comes from p\.yaml"),
        (["--documents", "--slashes", "5", "--seq-len", "640", "text.txt"],
         r"documents: one of 239 tokens begins at token 401, within a block of 128.*\(--align\)"),
        (["--documents", "--selector", "shifted-groups"], "documents: shifted-groups is not chosen per document"),
        (["--align"], "--align: aligns documents: give --documents"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_config("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a " * 200)
    (tmp_path / "p.yaml").write_text("selector: xattention")
    (tmp_path / "s.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    command = ["capture", "--model", "model", "--random-weights", "--seq-len", "256", "--text", "text.txt", "-o", "t"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert re.search(told, result.output)
