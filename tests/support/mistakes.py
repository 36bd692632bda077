"""A user's mistakes: what is said of one, and the folder that they are made in, with good files and bad ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from sparsering import cli
from train_runs import merged, write_run

PREFIX = "sparsering: "
TRACE = "--seq-len 1024 --block-size 64 --heads 2 --kv-heads 1 --head-dim 16 --columns 16"
PLAN = "--cluster local-cpu-4 --backend blockwise --dtype float32 --evaluator recurrence"


@dataclass(frozen=True)
class Mistake:
    """A command line, the words that its one line must hold, and its exit code."""

    arguments: str
    says: tuple[str, ...]
    code: int = 2


def mistake(arguments: str, *says: str, code: int = 2) -> Mistake:
    """Return a mistake."""
    return Mistake(arguments, says, code)


def names(mistakes: Sequence[Mistake]) -> list[str]:
    """Return pytest's ids: the command lines."""
    return [one.arguments[:70] for one in mistakes]


def listing(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder, and its folders."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def assert_one_line(stderr: str, says: Sequence[str]) -> None:
    """Fail unless it is one good line, with all of these words."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith(PREFIX), stderr
    assert len(lines[0]) < 600, "too long to be read"
    for leak in ("Traceback", "validation error", "pydantic", "KeyError", "ModelShape(", "<class", "Error("):
        assert leak not in lines[0], stderr
    for word in says:
        assert word in lines[0], stderr


def judge(folder: Path, made: Mistake) -> None:
    """Make a mistake in a folder, in this process; fail unless it is refused in one line and nothing is written."""
    before = listing(folder)
    result = CliRunner().invoke(cli.app, made.arguments.split(), prog_name="sparsering")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.stdout == ""
    assert_one_line(result.stderr, made.says)
    assert result.exit_code == made.code
    assert listing(folder) == before, "something was written"


def used(arguments: str) -> None:
    """Run a good command line."""
    result = CliRunner().invoke(cli.app, arguments.split(), prog_name="sparsering", catch_exceptions=False)
    assert result.exit_code == 0, result.output


def write_workspace(folder: Path) -> None:
    """Write good files into the folder, which is the current one, and bad ones of every kind."""
    for name, seed in (("trace", 0), ("other-trace", 1)):
        used(f"synthesize vertical-slash -o {name} --seed {seed} {TRACE}")
        plan = name.replace("trace", "plan") + ".json"
        used(f"plan --trace {name} -o {plan} {PLAN}")
        used(f"simulate {plan} --trace {name} --cluster local-cpu-4 -o {name.replace('trace', 'timeline')}.json.gz")
    used(f"plan --trace trace -o triton.json {PLAN.replace('blockwise', 'triton')}")
    write_run(folder / "run", seq_len_tokens=256)
    _write_bad_files(folder)
    _write_models(folder)
    _write_configurations(folder)


def _write_bad_files(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "text.txt").write_text("ring plan token block mask\n" * 200)
    (folder / "latin.txt").write_bytes("Ã©tÃ©".encode("latin-1") * 100)
    (folder / "notes.md").write_text("notes that nobody should lose\n")
    (folder / "bad.jsonl").write_text('{"words": "no text here"}\n')
    (folder / "broken.yaml").write_text("gpu: [1, 2\n")
    (folder / "list.json").write_text("[1, 2]\n")
    (folder / "folder").mkdir()
    plan = (folder / "plan.json").read_text()
    (folder / "cut-plan.json").write_text(plan[: len(plan) // 2])
    (folder / "flipped-plan.json").write_text(plan.replace('"seq_len_tokens": 1024', '"seq_len_tokens": 2048'))
    _changed(folder / "plan.json", folder / "newer-plan.json", schema_version=9)
    timeline = (folder / "timeline.json.gz").read_bytes()
    (folder / "cut-timeline.json.gz").write_bytes(timeline[: len(timeline) // 2])
    for name in ("cut-trace", "newer-trace"):
        (folder / name).mkdir()
        for path in (folder / "trace").iterdir():
            data = path.read_bytes()
            cut = name == "cut-trace" and path.suffix == ".parquet"
            (folder / name / path.name).write_bytes(data[: len(data) // 2] if cut else data)
    _changed(folder / "trace" / "manifest.json", folder / "newer-trace" / "manifest.json", schema_version=9)


def _changed(source: Path, target: Path, **changes: Any) -> None:
    target.write_text(json.dumps(json.loads(source.read_text()) | changes))


def _write_models(folder: Path) -> None:
    (folder / "no-model").mkdir()
    (folder / "no-model" / "readme.txt").write_text("nothing here\n")
    good = json.loads((folder / "run" / "model" / "config.json").read_text())
    for name, changes in {
        "odd-heads": {"num_attention_heads": 5},
        "bad-rope": {"rope_scaling": {"rope_type": "yarm", "factor": 4.0}},
        "unknown-type": {"model_type": "qwen2x"},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(good | changes))
    (folder / "broken-model").mkdir()
    (folder / "broken-model" / "config.json").write_text("{")


def _write_configurations(folder: Path) -> None:
    good = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    for name, changes in {
        "misspelt": {"optimiser": {"learning_rate": 1e-3}},
        "misspelt-inside": {"optimizer": {"learning_rte": 1e-3}},
        "negative": {"steps": -1},
        "nan": {"optimizer": {"learning_rate": float("nan")}},
        "text-for-number": {"steps": "many"},
        "list-for-section": {"optimizer": [1]},
        "layout": {"plan": {"layout": "rnig"}},
        "layout-parameter": {"plan": {"layout": "ring", "layout_parameters": {"prefech": 1}}},
        "selector": {"plan": {"pattern": {"selector": "vertical-slsh"}}},
        "setting": {"plan": {"pattern": {"selector": "sink-window", "settings": {"window_token": 8}}}},
        "backend": {"plan": {"backend": "blockwize"}},
        "attention": {"attention": "dense-zigzg"},
        "dtype": {"dtype": "bfloat61"},
        "float16": {"dtype": "float16"},
        "device": {"device": "gpu"},
        "no-data": {"data": {"folder": str(folder / "nowhere")}},
        "no-model": {"model": {"path": str(folder / "no-model"), "random_weights": True}},
        "no-weights": {"model": {"random_weights": False}},
        "rope": {
            "model": {
                "path": str(folder / "run" / "model"),
                "random_weights": True,
                "rope_parameters": {"rope_type": "yarm", "factor": 4.0},
            }
        },
        "rope-number": {
            "model": {
                "path": str(folder / "run" / "model"),
                "random_weights": True,
                "rope_parameters": {"rope_type": "yarn", "factor": "four"},
            }
        },
        "other-plan": {"plan": {"file": str(folder / "plan.json")}},
        "trace-as-plan": {"plan": {"file": str(folder / "trace" / "manifest.json")}},
        "no-ranks": {"parallel": {"context": 0}},
        "too-long": {"seq_len_tokens": 10**9},
    }.items():
        (folder / f"train-{name}.yaml").write_text(yaml.safe_dump(merged(good, changes)))
    cluster = yaml.safe_load((Path(cli.__file__).parent / "planner" / "presets" / "a100-nvlink-8.yaml").read_text())
    gpu = dict(cluster["gpu"])
    for name, changes in {
        "misspelt": {"gpu": {"multiprocesors" if key == "multiprocessors" else key: gpu[key] for key in gpu}},
        "negative": {"nodes": -1},
        "none": {"gpus_per_node": 0},
        "huge": {"nodes": 10**9},
        "nan": {"gpu": gpu | {"peak_flops_per_us": float("nan")}},
        "newer": {"schema_version": 9},
    }.items():
        (folder / f"cluster-{name}.yaml").write_text(yaml.safe_dump(cluster | changes))
