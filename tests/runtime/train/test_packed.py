"""Training on packed documents whose patterns are chosen: a packed run is each document alone, to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from model_cases import case_config
from rank_pool import RankPool
from sparsering.cli import app
from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.setup import set_up
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from train_runs import require_verified_replay, write_run, write_text

Pools = Callable[[int], RankPool]
BLOCK = 64
LENGTHS = (256, 130, 1, 300)  # filled up to 256, 192, 64, 320
TOKENS = 832
APART = {"loss": True, "positions": True, "attention": True}
SLASHES = {"selector": "vertical-slash", "settings": {"columns": 9, "slashes": 5, "sink_tokens": 2, "window_tokens": 4}}
FLEX = {"selector": "flex", "settings": {"column_mass": 0.1, "column_cap": 12, "slash_mass": 0.02, "slash_cap": 9}}
# AdamW's first step is the gradient over an epsilon that is far above it, so that parameters tell gradients.
LINEAR = {"learning_rate": 1e6, "epsilon": 1e6, "weight_decay": 0.0, "clip_norm": None, "warmup_steps": 0}


def texts(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[Path]:
    """Write a file of so many tokens each, its separator among them."""
    written = write_text(folder, documents=1, bytes_each=2000) / "0.txt"
    text, files = written.read_text(), []
    written.unlink()
    for number, length in enumerate(lengths):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(text[number : number + length - 1])
    return files


def run_with(folder: Path, files: list[Path], *, align: int = 1, **changes: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    write_data(files, folder / "data", byte_tokenizer(), align_tokens=align)
    changes = {"steps": 1, "dtype": "float64", "optimizer": LINEAR, "data": {"documents": APART}} | changes
    return write_run(folder, **changes)


@pytest.mark.parametrize(("world_size", "pattern"), [(1, FLEX), (2, SLASHES), (4, SLASHES), (4, FLEX)])
def test_a_packed_run_is_each_document_alone(
    world_size: int, pattern: dict[str, Any], tmp_path: Path, rank_pools: Pools
) -> None:
    """Loss and all gradients; a document of one token, padding, documents over all ranks."""
    files, plan = texts(tmp_path / "text"), {"pattern": pattern}
    packed = run_with(
        tmp_path / "packed", files, align=BLOCK, seq_len_tokens=TOKENS, plan=plan, parallel={"context": world_size},
        verify={"every_steps": 1, "rows": 32, "layers": 3},
    )  # fmt: skip
    together = rank_pools(world_size).run("train_jobs.run", config=packed)
    pieces, counts = [], []
    for length, file in zip(LENGTHS, files, strict=True):
        if length > 1:  # of one token nothing is to be predicted
            alone = run_with(
                tmp_path / file.stem, [file], seq_len_tokens=length, plan=plan, parallel={"context": 1},
                data={"documents": {}},
            )  # fmt: skip
            pieces.append(rank_pools(1).run("train_jobs.run", config=alone)[0])
            counts.append(length - 1)
    for result in together:
        assert result["valid"] == [sum(counts)]
        wanted = np.average([one["losses"][0] for one in pieces], weights=counts)
        assert result["losses"][0] == pytest.approx(wanted, rel=1e-9)
        for name, found in result["parameters"].items():
            right = np.average([one["parameters"][name] for one in pieces], axis=0, weights=counts)
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"documents": APART}},
         r"data\.documents\.attention: 'vertical-slash' .* whole blocks of 64; 1 begin within one, the first, of 301 "
         r"tokens, at token 387 of sequence 0: write the data with `sparsering data --align 64`"),
    ],
)  # fmt: skip
def test_documents_that_have_other_blocks_alone_are_refused_before_any_work(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    files = texts(tmp_path / "text", (256, 130, 1, 301))
    config = run_with(tmp_path / "run", files, seq_len_tokens=688, plan={"pattern": SLASHES}, **changes)
    with pytest.raises(InputError, match=told) as caught:
        set_up(parse_config(config))
    assert "\n" not in str(caught.value)


def test_a_plan_has_room_for_the_columns_of_all_documents(tmp_path: Path) -> None:
    """The plan made here is as wide as its data ask for; one from a file is refused where it is not."""
    files = texts(tmp_path / "text")
    config = run_with(tmp_path / "run", files, align=BLOCK, seq_len_tokens=TOKENS, plan={"pattern": SLASHES})
    made = set_up(parse_config(config)).plan
    assert made.columns_capacity == 3 * 9 and made.pattern.listed  # a document of one token has none
    one = run_with(tmp_path / "one", files, align=BLOCK, seq_len_tokens=TOKENS, plan={"pattern": SLASHES},
                   data={"documents": {}})  # fmt: skip
    narrow = set_up(parse_config(one)).plan
    assert narrow.columns_capacity == 9 and not narrow.pattern.listed
    narrow.save(tmp_path / "narrow.json")
    config |= {"plan": {"file": str(tmp_path / "narrow.json")}}
    with pytest.raises(
        InputError, match=r"may choose 27 columns for the documents of sequence 0; the plan has room for 9"
    ):
        set_up(parse_config(config))


def test_padding_is_predicted_by_nothing(tmp_path: Path) -> None:
    """Whatever documents are asked for; figures of the command count none of it."""
    files = texts(tmp_path / "text")
    asked = ["data", *files, "-o", tmp_path / "data", "--align", BLOCK, "--json"]
    shown = CliRunner().invoke(app, [str(one) for one in asked])
    figures = json.loads(shown.stdout.splitlines()[-1])
    assert (figures["documents"], figures["tokens"]) == (4, TOKENS)
    data = TokenData.open(tmp_path / "data")
    data.verify()
    sequence = data.sequence(0, TOKENS)
    assert sequence.padding is not None
    wanted = [
        length > place for length, room in zip(LENGTHS, (256, 192, 64, 320), strict=True) for place in range(room)
    ]
    np.testing.assert_array_equal(~sequence.padding, wanted)
    assert (sequence.tokens[sequence.padding] == 0).all()
    packed = data.packed(TOKENS)
    assert packed.first.tolist() == [0, 256, 386, 448, 449, 512, 812]
    assert data.packed(416).sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 1] and data.packed(416).first[3] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", "gemma3-window"])
@pytest.mark.parametrize("pattern", [SLASHES, FLEX], ids=lambda one: one["selector"])
def test_packed_documents_from_capture_to_training(
    name: str, pattern: dict[str, Any], tmp_path: Path, rank_pools: Pools
) -> None:
    """`capture --documents --align`, `inspect`, `plan`, `run` of what was recorded, training by a plan that chooses."""
    files = texts(tmp_path / "text")
    config = run_with(
        tmp_path / "run", files, align=BLOCK, seq_len_tokens=TOKENS, dtype="float32", steps=2,
        model=case_config(name).to_dict(), plan={"pattern": pattern}, optimizer={},
        verify={"every_steps": 1, "rows": 32, "layers": 3},
        trace_out={"folder": str(tmp_path / "live"), "every_steps": 1},
    )  # fmt: skip
    (tmp_path / "patterns.yaml").write_text(json.dumps(pattern))
    _run("capture", "--model", tmp_path / "run/model", "--random-weights", "--seq-len", 768, "--block-size", BLOCK,
         "--patterns", tmp_path / "patterns.yaml", "--documents", "--align", "--sparse", "-o", tmp_path / "trace",
         *files)  # fmt: skip
    told = json.loads(_run("inspect", tmp_path / "trace", "--json"))
    assert [one["tokens"] for one in told["documents"]] == [256, 130, 62, 1, 63, 256]
    assert all(0 < one["kept_mass_min"] <= one["kept_mass_mean"] <= 1 for one in told["documents"])
    assert min(one["kept_mass_mean"] for one in told["documents"]) < 0.99
    assert "of which least is kept" in _run("inspect", tmp_path / "trace")
    planned = ["plan", "--trace", tmp_path / "trace", "--cluster", "local-cpu-4", "--set", "gpus_per_node=2",
               "--backend", "blockwise", "-o", tmp_path / "replay.json"]  # fmt: skip
    _run(*planned)
    require_verified_replay(tmp_path / "replay.json", tmp_path / "trace")
    set_up(parse_config(config)).plan.save(tmp_path / "choose.json")
    config |= {"plan": {"file": str(tmp_path / "choose.json")}}
    results = rank_pools(2).run("train_jobs.run", config=config)
    assert results[0]["losses"] == results[1]["losses"] and np.isfinite(results[0]["losses"]).all()
    live = Trace.open(tmp_path / "live")
    rows = [row for layer in live.layers for row in live.layer_rows(live.steps[0], layer)]
    chosen = [row for row in rows if row.choice.selector == pattern["selector"]]
    assert chosen and all(len(row.choice.kept_mass_documents or ()) == 7 for row in chosen)
    assert any(row.pattern.columns.size for row in chosen)


def _run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output
