"""The documents say what is there: links lead somewhere, settings work. Commands: test_blocks.py."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from source_files import DOCUMENTS, document_id
from sparsering import cli
from sparsering.planner.cost.cluster import PRESETS, load_cluster
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.runtime.train.config import TrainConfig, load_config, parse_config
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from sparsering.traces.yaml_files import read_yaml
from train_runs import write_model, write_run, write_text


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_links_between_files_lead_somewhere(document: Path):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_links_to_headings_lead_to_one(document: Path):
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", document.read_text())
    missing = [(name, anchor) for name, anchor in links if anchor not in anchors(document.parent / name, document)]
    assert missing == []


def anchors(target: Path, document: Path) -> set[str]:
    """Return the names of a document's headings as links know them; of the linking document where none is named."""
    text = (target if target.is_file() else document).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def yaml_blocks(text: str) -> list[str]:
    """Return what stands in the fences of a document that say yaml, without the indentation of the fence."""
    fences = re.findall(r"^([ \t]*)(`{3,}|~{3,})ya?ml\b[^\n]*\n(.*?)^\1\2[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, _, block in fences]


BLOCKS = [
    pytest.param(block, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, block in enumerate(yaml_blocks(document.read_text()))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_settings_shown_work_as_printed(block: str, tmp_path: Path):
    exercise(block, tmp_path)


@pytest.mark.parametrize("block", [param for param in BLOCKS if "\n  file: " in str(param.values[0])])
def test_settings_of_the_default_plan_work_as_printed_beside_a_plan_file(block: str, tmp_path: Path):
    """What a block says of the default plan is read where its lines of the plan file are left out."""
    without = re.sub(r"^  (file|trace): .*\n", "", block, flags=re.MULTILINE)
    assert without.count("\n") == block.count("\n") - 2
    exercise(without, tmp_path)


def test_settings_are_shown_and_no_block_of_them_escapes():
    shown = [param.values[0] for param in BLOCKS]
    assert any("seq_len_tokens:" in str(block) for block in shown)
    told = sum(len(re.findall(r"(?:`{3,}|~{3,})[ \t]*ya?ml", path.read_text(), re.IGNORECASE)) for path in DOCUMENTS)
    assert told == len(shown)
    assert yaml_blocks("x\n```yaml\na: 1\n```\n- y\n\n  ```yaml\n  b:\n    c: 1\n  ```\n") == ["a: 1\n", "b:\n  c: 1\n"]


def test_a_cluster_shown_would_be_loaded(tmp_path: Path):
    text = (PRESETS / "h100-ndr-4x8.yaml").read_text()
    exercise(text, tmp_path)
    with pytest.raises(ValueError, match=r"gpu\.multiprocesors"):
        exercise(text.replace("multiprocessors", "multiprocesors"), tmp_path)


def test_settings_of_an_unknown_kind_would_be_noticed(tmp_path: Path):
    with pytest.raises(pytest.fail.Exception, match=r"unknown kind: \['path', 'random_weights'\]"):
        exercise("path: model\nrandom_weights: true\n", tmp_path)


def exercise(block: str, folder: Path) -> None:
    """Do with the text of a YAML block what its reader would: dry-run a training configuration, load a cluster."""
    path = folder / "block.yaml"
    path.write_text(block)
    document = read_yaml(path, max_bytes=1 << 16)
    keys = set(document) if isinstance(document, dict) else set()
    if keys >= {"model", "data", "seq_len_tokens"}:
        dry_run(path, document)
    elif keys >= {"nodes", "gpus_per_node", "gpu"}:
        assert load_cluster(path).name == document["name"]
    elif keys and keys <= set(TrainConfig.model_fields):  # some sections of a training configuration
        parse_config(write_run(folder / "run") | document)
    else:
        pytest.fail(f"a block of unknown kind: {sorted(keys)}")


def dry_run(path: Path, document: dict[str, Any]) -> None:
    """Run `sparsering train --dry-run` on a configuration as it stands, beside small files of the names it gives."""
    config = load_config(path)
    write_what_is_named(config)
    shown = CliRunner().invoke(cli.app, ["train", str(path), "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    summary = json.loads(shown.stdout)
    assert summary["tokens_per_step"] == config.sequences_per_step * document["seq_len_tokens"]
    assert summary["configuration"]["model"]["rope_parameters"] == document["model"].get("rope_parameters")
    if config.plan.file is not None:
        assert summary["plan"] == str(config.plan.file)
    elif config.attention == "planned":
        assert f"layout {config.plan.make_layout()}" in summary["plan"]
        for name, value in config.plan.pattern.settings.items():
            assert f"{name!r}: {value}" in summary["plan"]


def write_what_is_named(config: TrainConfig) -> None:
    """Write model, data, trace and plan where the configuration says: tiny heads and layers, lengths as configured."""
    tokens = config.seq_len_tokens
    write_model(config.model.path, max_position_embeddings=tokens)
    if not config.model.random_weights:
        tiny = AutoConfig.from_pretrained(config.model.path)
        AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).save_pretrained(config.model.path)
    text = write_text(config.data.folder.parent / "text", documents=9, bytes_each=-(-tokens // 8))
    write_data([text], config.data.folder, byte_tokenizer())
    shape = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=8)
    pattern = PatternSpec(source="choose", selector="vertical-slash", settings={"columns": 64, "slashes": 64})
    if config.plan.trace is not None:
        drawn = SyntheticSettings(seq_len_tokens=tokens, heads=4, block_size=config.plan.block_size, columns=64)
        trace = write_synthetic_trace(config.plan.trace, "vertical-slash", drawn, layers=2, kv_heads=2, head_dim=8)
        pattern = PatternSpec(source="trace", trace_sha256=trace.digest())
    if config.plan.file is not None:
        make_plan(
            attention=AttentionSpec(model=shape, seq_len_tokens=tokens, block_size=config.plan.block_size,
                                    dtype=config.dtype, columns_capacity=128),
            placement=striped(seq_len_tokens=tokens, world_size=config.parallel.context,
                              granularity_tokens=config.plan.block_size),
            forward=config.plan.make_layout(), pattern=pattern, kernels=KernelSpec(backend="blockwise"),
        ).save(config.plan.file)  # fmt: skip
