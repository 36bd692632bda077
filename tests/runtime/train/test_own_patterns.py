"""Models with windows, sinks, softcaps, chunks and experts of their own: as alone, and from capture to training.

The self-check recomputes rows of every layer by their definition in every step of these runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from model_cases import case_config
from rank_pool import RankPool
from sparsering.cli import app
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.setup import set_up
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from train_alone import assert_same_training, trained_alone
from train_runs import SEQ_LEN_TOKENS, require_verified_replay, write_run, write_text

Pools = Callable[[int], RankPool]
CHECKED = {"every_steps": 1, "rows": 32, "layers": 3}
MODELS = ["gpt-oss", "gemma3-window", "gemma2", "olmo3", "llama4-chunks", "mistral-window"]
# Some of their gradients are near zero: of these rounding decides the sign, which is all that AdamW would step by.
MODELS_OF_OTHER_HEADS = ["deepseek-v3", "mimo", "gemma4-shared-keys"]
APART = {"loss": True, "positions": True, "attention": True}


def _settings(name: str) -> dict[str, Any]:
    """Return a case's configuration as `write_run` takes it."""
    return case_config(name).to_dict()


@pytest.mark.parametrize("name", MODELS + MODELS_OF_OTHER_HEADS)
def test_a_model_is_trained_as_alone(name: str, tmp_path: Path, rank_pools: Pools) -> None:
    optimizer = {"epsilon": 1e-3} if name in MODELS_OF_OTHER_HEADS else {}
    common: dict[str, Any] = {"attention": "dense", "steps": 2, "verify": CHECKED, "optimizer": optimizer}
    config = write_run(tmp_path, model=_settings(name), **common)
    assert_same_training(rank_pools(2).run("train_jobs.run", config=config), trained_alone(config))


@pytest.mark.parametrize("name", ["gpt-oss", "gemma3-window"])
def test_packed_documents_are_trained_on_as_if_apart(name: str, tmp_path: Path, rank_pools: Pools) -> None:
    config = write_run(
        tmp_path, model=_settings(name), seq_len_tokens=1000, steps=2, attention="dense", data={"documents": APART},
        verify=CHECKED,
    )  # fmt: skip
    alone = trained_alone(config, per_document=True)
    assert_same_training(rank_pools(2).run("train_jobs.run", config=config), alone)


@pytest.mark.parametrize("name", ["gpt-oss", "gemma3-window"])
def test_chosen_patterns_of_packed_documents_are_those_of_each_alone(
    name: str, tmp_path: Path, rank_pools: Pools
) -> None:
    """XAttention over documents of whole blocks; float64, so that a loss tells every difference."""
    pattern = {"selector": "xattention", "settings": {"mass": 0.4, "stride": 16}}
    common: dict[str, Any] = {
        "model": _settings(name), "steps": 1, "dtype": "float64", "plan": {"pattern": pattern}, "verify": CHECKED,
        "data": {"documents": APART}, "optimizer": {"learning_rate": 1e-30},
    }  # fmt: skip
    lengths, losses, counts = (256, 192, 320), [], []
    texts = [
        write_text(tmp_path / f"text-{length}", documents=1, bytes_each=length - 1) / "0.txt" for length in lengths
    ]
    packed = write_run(_with_data(tmp_path / "packed", texts), seq_len_tokens=sum(lengths), **common)
    together = rank_pools(2).run("train_jobs.run", config=packed)[0]
    for length, text in zip(lengths, texts, strict=True):
        alone = write_run(_with_data(tmp_path / f"{length}", [text]), seq_len_tokens=length, **common)
        found = rank_pools(2).run("train_jobs.run", config=alone)[0]
        losses.append(found["losses"][0])
        counts.append(found["valid"][0])
    assert together["valid"][0] == sum(counts)
    assert together["losses"][0] == pytest.approx(np.average(losses, weights=counts), rel=1e-9)


def _with_data(folder: Path, texts: list[Path]) -> Path:
    folder.mkdir(parents=True)
    write_data(texts, folder / "data", byte_tokenizer())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", "gemma3-window", "gemma4", "mimo"])
def test_from_capture_to_training(name: str, tmp_path: Path, rank_pools: Pools) -> None:
    """`capture`, `plan`, `run` of what was recorded, and training by a plan that chooses anew."""
    config = write_run(
        tmp_path, model=_settings(name), steps=2, verify=CHECKED, metrics={"folder": str(tmp_path / "m")}
    )
    text = next((tmp_path / "text").glob("*.txt"))
    _run("capture", "--model", tmp_path / "model", "--random-weights", "--text", text, "--seq-len", SEQ_LEN_TOKENS,
         "--block-size", 64, "--selector", "xattention", "--p", 0.5, "-o", tmp_path / "trace")  # fmt: skip
    trace = Trace.open(tmp_path / "trace")
    kinds = [trace.layer_rows(0, layer)[0].choice.selector for layer in trace.layers]
    limited = [bool(window) for window in trace.header.model.windows or ()]
    assert kinds == ["model" if own else "xattention" for own in limited]
    assert set(kinds) == {"model", "xattention"}
    planned: list[Any] = ["plan", "--trace", tmp_path / "trace", "--cluster", "local-cpu-4", "--set", "gpus_per_node=2",
                          "--backend", "blockwise"]  # fmt: skip
    _run(*planned, "-o", tmp_path / "replay.json")
    require_verified_replay(tmp_path / "replay.json", tmp_path / "trace")
    _run(*planned, "--pattern", "choose", "--dtype", "float32", "-o", tmp_path / "choose.json")
    config |= {"plan": {"file": str(tmp_path / "choose.json")}}
    results = rank_pools(2).run("train_jobs.run", config=config)
    assert results[0]["losses"] == results[1]["losses"]
    assert all(np.isfinite(results[0]["losses"]))
    lines = [json.loads(line) for line in (tmp_path / "m/rank-00000.jsonl").read_text().splitlines()]
    assert all(0 < line["density"] < 1 for line in lines)


def _run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("gemma3-window", {"attention": "dense-zigzag"}, "attention: .*window"),
        ("gemma2", {"attention": "dense-zigzag", "seq_len_tokens": 64}, "attention: .*softcap; the model's is 2.0"),
        ("llama4-chunks", {"attention": "dense", "data": {"documents": APART}},
         r"data\.documents\.attention: is on, and the model attends in chunks of 72 tokens"),
        ("gpt-oss", {"plan": {"backend": "flash4"}}, "flash4"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_any_work(
    name: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told) as caught:
        set_up(parse_config(write_run(tmp_path, model=_settings(name), **changes)))
    assert "\n" not in str(caught.value)


def test_selectors_that_no_layer_asks_are_not_judged(tmp_path: Path) -> None:
    """All layers of Mistral have windows: whatever is named chooses for none."""
    pattern = {"selector": "vertical-slash", "settings": {}}
    config = write_run(
        tmp_path, model=_settings("mistral-window"), plan={"pattern": pattern}, data={"documents": APART}
    )
    assert set_up(parse_config(config)).plan.pattern.selector == "vertical-slash"


@pytest.mark.parametrize("name", ["mistral-window", "gemma2"])
def test_a_run_with_limits_is_estimated_beside_dense_attention(name: str, tmp_path: Path) -> None:
    documents = {"documents": APART}
    write_run(tmp_path, model=_settings(name), data=documents, plan={"pattern": {"selector": "xattention"}})
    text = next((tmp_path / "text").glob("*.txt"))
    _run("capture", "--model", tmp_path / "model", "--random-weights", "--text", text, "--seq-len", SEQ_LEN_TOKENS,
         "--block-size", 64, "--selector", "xattention", "-o", tmp_path / "trace")  # fmt: skip
    shown = _run("estimate", tmp_path / "config.yaml", "--cluster", "h100-nvlink-8", "--trace", tmp_path / "trace",
                 "--json")  # fmt: skip
    assert [arm["attention"] for arm in json.loads(shown)["arms"]] == ["planned", "dense-zigzag"]
    other = write_run(tmp_path / "other", model={"num_hidden_layers": 3})
    other["plan"] = {"block_size": 64, "pattern": {"selector": "xattention"}}
    (tmp_path / "other/config.yaml").write_text(yaml.safe_dump(other))
    asked = ["estimate", tmp_path / "other/config.yaml", "--cluster", "h100-nvlink-8", "--trace", tmp_path / "trace"]
    refused = CliRunner().invoke(app, [str(one) for one in asked])
    assert refused.exit_code == 2
    assert "the run's model has" in refused.output


def test_a_packed_trace_is_not_replayed_over_other_data(tmp_path: Path) -> None:
    write_run(tmp_path, model=_settings("gemma3-window"))
    files = sorted((tmp_path / "text").glob("*.txt"))[:2]
    for number, file in enumerate(files):
        file.write_text(file.read_text()[: 100 + number])
    _run("capture", "--model", tmp_path / "model", "--random-weights", "--seq-len", 200, "--block-size", 64,
         "--selector", "xattention", "--documents", "-o", tmp_path / "trace", *files)  # fmt: skip
    _run("plan", "--trace", tmp_path / "trace", "--cluster", "local-cpu-4", "--set", "gpus_per_node=2", "--backend",
         "blockwise", "--dtype", "float32", "-o", tmp_path / "plan.json")  # fmt: skip
    plan = {"file": str(tmp_path / "plan.json"), "trace": str(tmp_path / "trace")}
    config = write_run(tmp_path, seq_len_tokens=200) | {"plan": plan}
    with pytest.raises(InputError, match="is of packed documents: replayed"):
        set_up(parse_config(config))


def test_layers_by_rule_are_trained(tmp_path: Path, rank_pools: Pools) -> None:
    """Every second layer dense: of the model's three, the first has its own window whatever the rule says."""
    rules = {"selector": "moba-block", "settings": {"chunk_tokens": 64, "top_chunks": 1},
             "layers": [{"every": 2, "selector": "dense"}]}  # fmt: skip
    trace_out = {"folder": str(tmp_path / "live"), "every_steps": 1}
    config = write_run(
        tmp_path, model=_settings("gemma3-window"), steps=1, plan={"pattern": rules}, verify=CHECKED,
        trace_out=trace_out,
    )  # fmt: skip
    results = rank_pools(2).run("train_jobs.run", config=config)
    assert results[0]["losses"] == results[1]["losses"]
    live = Trace.open(tmp_path / "live")
    found = [live.layer_rows(live.steps[0], layer)[0].choice.selector for layer in live.layers]
    assert found == ["model", "moba-block", "model"]
