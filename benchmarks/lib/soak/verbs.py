"""Whole `sparsering` verbs as processes of their own, one after the other, and what each of them leaves behind."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....runtime.comm.start import PACKAGE
from ....runtime.data.writer import byte_tokenizer, write_data
from ....traces.files import write_json
from ....traces.synthetic import GENERATORS
from .watch import marked

MARK = "SPARSERING_SOAK_VERB"
TIMEOUT_S = 900.0
MODEL = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 256, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WORDS = ("ring ", "plan ", "token ", "block ", "mask\n")


def write_model_and_data(folder: Path) -> tuple[Path, Path]:
    """Write a tiny model's configuration, texts, and their tokens; return the folders of model and tokens."""
    write_json(folder / "model" / "config.json", MODEL)
    (folder / "text").mkdir()
    dice = random.Random(0)
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text("".join(dice.choices(WORDS, k=200)))
    write_data([folder / "text"], folder / "data", byte_tokenizer())
    return folder / "model", folder / "data"


def draw_verbs(dice: random.Random) -> dict[str, Any]:
    """Return a configuration of a chain of verbs."""
    heads, kv_heads = dice.choice(((2, 1), (4, 2), (4, 4)))
    return {
        "kind": "verbs",
        "seed": dice.randrange(1 << 31),
        "chain": dice.choice(("plan", "plan", "train")),
        "mask": dice.choice(sorted(GENERATORS)),
        "seq_len_tokens": dice.randint(512, 4096),
        "heads": heads,
        "kv_heads": kv_heads,
        "dtype": dice.choice(("float32", "float64", "bfloat16")),
    }


def play_verbs(values: Mapping[str, Any], folder: Path, *, environment: Mapping[str, str]) -> list[str]:
    """Run a chain of verbs in an empty folder; return what is wrong with any of them."""
    chain = {"plan": _plan_chain, "train": _train_chain}[values["chain"]]
    for line in chain(values, folder):
        if problems := _run(line, folder, environment):
            return [f"{line}: {one}" for one in problems]
    left = sorted(str(path) for path in folder.rglob("*.partial*"))
    return [f"left: {left}"] if left else []


def _plan_chain(values: Mapping[str, Any], folder: Path) -> Iterator[str]:
    sizes = f"--seq-len {values['seq_len_tokens']} --block-size 128 --heads {values['heads']} --layers 2"
    sizes += f" --kv-heads {values['kv_heads']} --head-dim 16 --columns 64 --chunk 256 --document 700"
    yield f"synthesize {values['mask']} -o trace {sizes} --seed {values['seed']}"
    yield "inspect trace"
    yield f"plan --trace trace --cluster local-cpu-4 --backend blockwise --dtype {values['dtype']} -o plan.json"
    yield "check plan.json"
    yield "simulate plan.json --cluster local-cpu-4 -o simulated.json.gz"
    yield "run plan.json --verify --repeats 1 --warmups 0 --device cpu -o measured.json.gz"
    yield "compare simulated.json.gz measured.json.gz"
    yield "report . -o report.html"
    yield "export measured.json.gz -o table"


def _train_chain(values: Mapping[str, Any], folder: Path) -> Iterator[str]:
    model, _ = write_model_and_data(folder)
    yield "data text -o tokens"
    yield f"capture --model {model.name} --random-weights --text text/0.txt --seq-len 512 --columns 16 -o trace"
    config = {
        "model": {"path": str(model), "random_weights": True}, "data": {"folder": str(folder / "tokens")},
        "seq_len_tokens": 300, "steps": 3, "dtype": "float32", "device": "cpu", "seed": values["seed"],
        "parallel": {"data": 1, "context": 2},
        "plan": {"block_size": 64, "pattern": {"selector": "sink-window", "settings": {"window_tokens": 100}}},
        "checkpoint": {"folder": str(folder / "checkpoints"), "every_steps": 1},
        "metrics": {"folder": str(folder / "metrics")}, "verify": {"every_steps": 1},
    }  # fmt: skip
    write_json(folder / "config.yaml", config)  # which is YAML, too
    yield "train config.yaml"
    yield "train config.yaml --set steps=4"
    yield "train config.yaml --set steps=4 --export exported"


def _run(line: str, folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Run one verb; return what is wrong with it."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", PACKAGE, *line.split()]
    try:
        ended = subprocess.run(
            command, cwd=folder, env={**environment, MARK: mark}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"did not end in {TIMEOUT_S:g} s"]
    problems = [f"exit code {ended.returncode}: {ended.stderr[-1500:]}"] if ended.returncode else []
    deadline = time.monotonic() + 5
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return problems + [f"process {number} still runs: {command}" for number, command in left.items()]
