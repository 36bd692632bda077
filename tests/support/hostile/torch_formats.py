"""The formats that need torch and transformers to be read: see `formats`."""

from __future__ import annotations

import json
from pathlib import Path

from formats import Format, of_json, of_yaml, write_sealed, write_text, write_yaml
from sparsering.planner.cost.counts import LaunchCounts
from sparsering.planner.cost.tables import LaunchPoint, MaskKind
from sparsering.runtime.calibrate.points import Case
from sparsering.runtime.calibrate.raw import RawPoints, Shape
from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.runtime.train.checkpoint import MANIFEST_NAME, verify_checkpoint
from sparsering.runtime.train.config import ModelSection, load_config
from sparsering.runtime.train.model import model_facts, read_model_config
from sparsering.traces.files import sealed, sha256_of_bytes, write_json
from train_runs import MODEL, write_run
from train_runs import write_text as write_texts

ROPE = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}, "max_position_embeddings": 64}
SHAPE = Shape(backend="blockwise", heads=2, kv_heads=1, head_dim=16, block_size=16)
FACTS = {"device": "cpu"}


def _model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(MODEL | ROPE | {"architectures": ["Qwen2ForCausalLM"]}))
    return folder / "config.json"


def _read_model(path: Path) -> None:
    model_facts(read_model_config(ModelSection(path=path, random_weights=True)))


def _training(folder: Path) -> Path:
    write_run(folder)
    return folder / "config.yaml"


def _checkpoint(folder: Path) -> Path:
    folder = folder / "step-00000001"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"m")
    (folder / "__0_0.distcp").write_bytes(b"d" * 100)
    files = {
        path.name: {"sha256": sha256_of_bytes(path.read_bytes()), "bytes": path.stat().st_size}
        for path in folder.iterdir()
    }
    raw = {"schema_version": 1, "kind": "sparsering-checkpoint", "step": 1, "facts": {"parameters": 9, "seed": 0}}
    write_json(folder / MANIFEST_NAME, sealed(raw | {"files": files}))
    return folder / MANIFEST_NAME


def _data(folder: Path) -> Path:
    write_data([write_texts(folder / "text")], folder / "data", byte_tokenizer())
    return folder / "data" / "manifest.json"


def _read_data(path: Path) -> None:
    data = TokenData.open(path.parent)
    data.verify()
    assert data.sequences(64)
    data.sequence(0, 64)


def _lines(folder: Path) -> Path:
    (folder / "text.jsonl").write_text(json.dumps({"text": "some words", "id": 7}) + "\n")
    return folder / "text.jsonl"


def _read_lines(path: Path) -> None:
    out = path.parent / "out"
    try:
        write_data([path], out, byte_tokenizer())
    finally:
        for left in out.glob("*"):
            left.unlink()


def _points(folder: Path) -> Path:
    case = Case(kind="vertical-slash", seq_len_tokens=1024, world_size=2, rank=0, density=0.1)
    counts = LaunchCounts(tile_pairs=9, column_tile_pairs=1, rows=5, longest_row=3, key_rows=9, longest_key_row=3,
                          cells=40)  # fmt: skip
    point = LaunchPoint(direction="forward", mask=MaskKind(), counts=counts, key_bytes=10, launch_us=5.0,
                        resumed_us=6.0, fresh_us=7.0, host_us=1.0, fresh_host_us=2.0)  # fmt: skip
    raw = RawPoints(path=folder / "points.json", facts=FACTS)
    raw.links = [{"transport": "p2p", "bytes_each_way": [1, 2], "microseconds": [1.0, 2.0], "slowdown": 0.1,
                  "post_us": 1.0}]  # fmt: skip
    raw.add(SHAPE, case, [point])
    return raw.path


def _read_points(path: Path) -> None:
    raw = RawPoints.open(path, FACTS)
    for entry in raw.entries:
        list(raw.of_shape(SHAPE))
        assert entry["points"] is not None


def _array(folder: Path) -> Path:
    import numpy as np

    np.save(folder / "ids.npy", np.arange(64, dtype=np.int32))
    return folder / "ids.npy"


FULL: list[Format] = [
    Format(name="model-config", make=_model, read=_read_model, document=of_json, write=write_text),
    Format(name="training-config", make=_training, read=load_config, document=of_yaml, write=write_yaml),
    Format(name="checkpoint", make=_checkpoint, read=lambda path: verify_checkpoint(path.parent), document=of_json,
           write=write_sealed),
    Format(name="data-manifest", make=_data, read=_read_data, document=of_json, write=write_sealed),
    Format(name="text-lines", make=_lines, read=_read_lines, document=of_json, write=write_text),
    Format(name="token-array", make=_array, read=_read_lines),
    Format(name="points", make=_points, read=_read_points, document=of_json, write=write_text),
]  # fmt: skip
