"""Ways into and out of a training run: model folders, tokenizers, plans of live traces, other patterns and layouts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rank_pool import RankPool
from sparsering.cli import app
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.two_level import TwoLevel
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.export import export_checkpoint
from sparsering.traces.dataset.store import Trace
from train_runs import SEQ_LEN_TOKENS, write_run, write_text

Pools = Callable[[int], RankPool]
SPARSE = {"selector": "vertical-slash", "settings": {"columns": 8, "slashes": 8, "window_tokens": 8}}
SHAPE = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=8)


def test_a_model_folder_is_trained_on_from_its_weights(tmp_path: Path, rank_pools: Pools) -> None:
    checkpoint = {"folder": str(tmp_path / "checkpoints"), "every_steps": 2, "asynchronous": False}
    first = write_run(tmp_path / "first", steps=2, checkpoint=checkpoint)
    trained = rank_pools(2).run("train_jobs.run", config=first)[0]
    export_checkpoint(parse_config(first), tmp_path / "exported")
    idle = {"learning_rate": 1e-30, "weight_decay": 0.0}
    second = write_run(tmp_path / "second", steps=1, optimizer=idle, seed=5)
    second["model"] = {"path": str(tmp_path / "exported"), "random_weights": False}
    again = rank_pools(2).run("train_jobs.run", config=second)[0]
    for name, value in trained["parameters"].items():
        np.testing.assert_array_equal(again["parameters"][name], value, err_msg=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    sequence = TokenData.open(Path(second["data"]["folder"])).at_step(
        0, 0, slots=1, seq_len_tokens=SEQ_LEN_TOKENS, seed=5
    )
    ids = torch.from_numpy(sequence.tokens)[None]
    assert again["losses"][0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def test_bfloat16_runs_keep_float32_parameters_and_states(tmp_path: Path, rank_pools: Pools) -> None:
    runs = {}
    for dtype in ("float32", "bfloat16"):
        config = write_run(tmp_path, dtype=dtype)
        runs[dtype] = rank_pools(2).run("train_jobs.states", config=config)[0]
    assert runs["bfloat16"]["types"] == ["torch.float32"]
    np.testing.assert_allclose(runs["bfloat16"]["losses"], runs["float32"]["losses"], rtol=0.02)
    assert runs["bfloat16"]["losses"] != runs["float32"]["losses"]
    # Steps smaller than bfloat16 can hold beside the weights still count: no parameter is a bfloat16 number by chance.
    weight = torch.from_numpy(runs["bfloat16"]["parameters"]["model.embed_tokens.weight"])
    assert (weight != weight.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize(
    ("selector", "settings"),
    [
        ("moba-block", {"chunk_tokens": 64, "top_chunks": 1}),
        ("xattention", {"mass": 0.5, "stride": 16}),
    ],
)
def test_other_selectors_train(selector: str, settings: dict[str, Any], tmp_path: Path, rank_pools: Pools) -> None:
    pattern = {"selector": selector, "settings": settings}
    config = write_run(tmp_path, steps=2, plan={"pattern": pattern}, metrics={"folder": str(tmp_path / "metrics")})
    results = rank_pools(2).run("train_jobs.run", config=config)
    assert all(np.isfinite(results[0]["losses"])) and results[0]["losses"] == results[1]["losses"]
    lines = [json.loads(line) for line in (tmp_path / "metrics/rank-00000.jsonl").read_text().splitlines()]
    assert all(0 < line["density"] < 1 for line in lines)


@pytest.mark.parametrize(
    "layout",
    [Hierarchical(inner_size=2), TwoLevel(inner_size=2), Ulysses(degree=2, chunks=2)],
)
def test_any_layout_of_a_plan_file_trains_alike(layout: Layout, tmp_path: Path, rank_pools: Pools) -> None:
    window = {"sink_tokens": 0, "window_tokens": SEQ_LEN_TOKENS}
    make_plan(
        attention=AttentionSpec(
            model=SHAPE,
            seq_len_tokens=SEQ_LEN_TOKENS,
            block_size=64,
            dtype="float32",
            columns_capacity=0,
        ),
        placement=striped(seq_len_tokens=SEQ_LEN_TOKENS, world_size=4, granularity_tokens=64),
        forward=layout,
        pattern=PatternSpec(source="choose", selector="sink-window", settings=window),
        kernels=KernelSpec(backend="blockwise"),
        head_orders=_reversed_orders() if layout.head_groups > 1 else None,
    ).save(tmp_path / "plan.json")
    common: dict[str, Any] = {"parallel": {"data": 1, "context": 4}, "steps": 3}
    by_file = write_run(tmp_path, plan={"file": str(tmp_path / "plan.json")}, **common)
    planned = rank_pools(4).run("train_jobs.run", config=by_file)[0]
    dense = rank_pools(4).run("train_jobs.run", config=write_run(tmp_path, attention="dense-zigzag", **common))[0]
    np.testing.assert_allclose(planned["losses"], dense["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(planned["norms"], dense["norms"], rtol=1e-4)


def _reversed_orders() -> tuple[tuple[int, ...], ...]:
    """Every second layer's heads from the last to the first."""
    orders = [tuple(range(SHAPE.heads)), tuple(reversed(range(SHAPE.heads)))]
    return tuple(orders[layer % 2] for layer in range(SHAPE.layers))


def test_the_next_plan_is_made_of_a_live_trace_and_replayed(tmp_path: Path, rank_pools: Pools) -> None:
    live = {"folder": str(tmp_path / "live"), "every_steps": 2}
    rank_pools(2).run("train_jobs.run", config=write_run(tmp_path, plan={"pattern": SPARSE}, steps=3, trace_out=live))
    arguments = ["plan", "--trace", live["folder"], "--cluster", "local-cpu-4", "-o", str(tmp_path / "plan.json")]
    made = CliRunner().invoke(app, [*arguments, "--dtype", "float32", "--json"])
    assert made.exit_code == 0, made.output
    plan = {"file": str(tmp_path / "plan.json"), "trace": live["folder"]}
    config = write_run(
        tmp_path / "next",
        plan=plan,
        parallel={"data": 1, "context": 4},
        steps=2,
        metrics={"folder": str(tmp_path / "metrics")},
    )
    rank_pools(4).run("train_jobs.run", config=config)
    trace = Trace.open(tmp_path / "live")
    densities = [trace.layer_pattern(trace.steps[-1], layer).density for layer in trace.layers]
    lines = [json.loads(line) for line in (tmp_path / "metrics/rank-00003.jsonl").read_text().splitlines()]
    assert [line["density_per_layer"] for line in lines] == [pytest.approx(densities)] * 2


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path: Path) -> None:
    write_run(
        tmp_path, metrics={"folder": str(tmp_path / "metrics")}, checkpoint={"folder": str(tmp_path / "checkpoints")},
        trace_out={"folder": str(tmp_path / "live")},
    )  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    summary = json.loads(shown.stdout)
    assert summary["configuration"]["steps"] == 5
    assert summary["configuration"]["optimizer"]["clip_norm"] == 1.0  # defaults are resolved
    assert len(summary["plan_digest"]) == 64 and "striped placement" in summary["plan"]
    assert summary["memory_bytes_per_rank"]["total"] > 0
    assert sorted(tmp_path.rglob("*")) == before
    told = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--dry-run"])
    assert f"plan digest: {summary['plan_digest'][:40]}" in told.stdout and "memory per rank:" in told.stdout


def test_a_dry_run_says_what_the_run_would_take_on_a_cluster(tmp_path: Path) -> None:
    write_run(tmp_path, attention="dense-zigzag", plan={})
    config = str(tmp_path / "config.yaml")
    shown = CliRunner().invoke(app, ["train", config, "--dry-run", "--cluster", "h100-nvlink-8"])
    assert shown.exit_code == 0, shown.output
    assert "a step on 2 GPUs of h100-nvlink-8" in shown.stdout and "unvalidated" in shown.stdout
    found = CliRunner().invoke(app, ["train", config, "--dry-run", "--cluster", "h100-nvlink-8", "--json"])
    assert [arm["attention"] for arm in json.loads(found.stdout)["estimate"]["arms"]] == ["dense-zigzag"]
    for given, told in (
        (["--cluster", "h100-nvlink-8"], "--cluster: goes with --dry-run"),
        (["--dry-run", "--trace", str(tmp_path)], "--trace: goes with --cluster"),
    ):
        refused = CliRunner().invoke(app, ["train", config, *given])
        assert refused.exit_code == 2 and told in refused.stderr and refused.stderr.count("\n") == 1


def test_text_becomes_tokens_of_a_models_own_tokenizer(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["<end>", "<unknown>", "ring", "plan", "token", "block"])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", unk_token="<unknown>")
    wrapped.save_pretrained(tmp_path / "model")
    text = write_text(tmp_path / "text", documents=3, bytes_each=200)
    arguments = ["data", str(text), "-o", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "model"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    data = TokenData.open(tmp_path / "data")
    expected = [t for path in sorted(text.iterdir()) for t in [*wrapped.encode(path.read_text()), words["<end>"]]]
    assert data.sequence(0, len(expected)).tokens.tolist() == expected
    assert data.manifest.vocabulary == len(words)


def test_the_slurm_template_is_a_script(repository: Path) -> None:
    script = repository / "runtime/templates/slurm.sh"
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(script)], check=True)
    assert "-m sparsering.runtime.train" in script.read_text()
