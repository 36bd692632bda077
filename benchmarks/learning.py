"""Does sparse training learn as well? The same model, seed and text, trained dense and sparse; both loss curves.

A byte-level model of Qwen2's architecture (24 million parameters) on source trees found on the machine. Every step sees
new text, so the training loss is that of text not seen before. Sparse layers choose vertical-slash patterns anew in
every step; their density is measured, and the run refuses to call itself sparse above --max-density.

    python -m sparsering.benchmarks.learning --gpus 2 --steps 300
    python -m sparsering.benchmarks.learning --toy       # two gloo processes on CPUs, a tiny model
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..kernels.select.vertical_slash import FixedVerticalSlash
from ..runtime.baselines.flash4 import NAME as FLASH4_RING
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import start_ranks
from ..runtime.data.shards import TokenData
from ..runtime.data.writer import byte_tokenizer, write_data
from ..runtime.train.config import TrainConfig, parse_config
from ..runtime.train.loop import Trainer
from ..runtime.train.metrics import StepResult
from ..runtime.train.patterns import Observed
from ..runtime.train.setup import set_up
from ..traces.files import write_atomically, write_json
from .lib.common import RESULTS, require_flash4_ring, write_result

MODEL = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 256, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 32768, "tie_word_embeddings": True, "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TOY = MODEL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "head_dim": 16}  # fmt: skip
BLOCK_SIZE = 64
LAST_STEPS = 20
COLORS = {"dense": "#1f77b4", "sparse": "#d62728"}


def main() -> None:
    """Prepare model and text and start the ranks, or be one."""
    arguments = _parser().parse_args()
    if arguments.toy:
        arguments.gpus, arguments.steps, arguments.seq_len = min(arguments.gpus, 2), min(arguments.steps, 8), 1024
        arguments.microbatches = 1
    if "RANK" not in os.environ:
        require_flash4_ring([arguments.dense], head_dim=int(MODEL["head_dim"]), toy=arguments.toy)
        with tempfile.TemporaryDirectory(prefix="sparsering-learning-") as folder:
            raise SystemExit(_start(arguments, arguments.work or Path(folder)))
    world = join(device="cpu" if arguments.toy else None, timeout_s=540)
    try:
        rows = [row for kind in ("dense", "sparse") for row in _train(arguments, world, kind)]
        if world.rank == 0:
            _report(arguments, rows)
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--slashes", type=int, default=110, help="token distances, the nearest 100 among them")
    parser.add_argument("--max-density", type=float, default=0.1)
    parser.add_argument("--dense", default="dense", choices=["dense", "dense-zigzag", FLASH4_RING],
                        help="our kernels, cuDNN's, or flash-attn-4's where its wheels are")  # fmt: skip
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--text", type=Path, nargs="+", help="source trees; default: Python's own and site-packages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path)
    return parser


def _start(arguments: argparse.Namespace, work: Path) -> int:
    write_json(work / "model" / "config.json", TOY if arguments.toy else MODEL)
    if not (work / "data").exists():
        _write_text(arguments, work)
    return start_ranks(
        [*sys.argv[1:], "--work", str(work)], world_size=arguments.gpus,
        environment=os.environ | {"OMP_NUM_THREADS": "2"}, module="sparsering.benchmarks.learning",
    )  # fmt: skip


def _write_text(arguments: argparse.Namespace, work: Path) -> None:
    """Write just enough text: files in the order of their names, large ones cut off so that none dominates."""
    wanted = (arguments.steps + 1) * arguments.microbatches * arguments.seq_len
    paths = sysconfig.get_paths()
    found, gathered = 0, []
    for root in arguments.text or [Path(paths["stdlib"]), Path(paths["purelib"]), Path(torch.__file__).parent]:
        for path in sorted(root.rglob("*.py")):
            if found < wanted and path.is_file() and path.stat().st_size > 1000:
                gathered.append(path.read_bytes()[:65536])
                found += len(gathered[-1]) + 1
    for number, text in enumerate(gathered):
        write_atomically(work / "text" / f"{number:06d}.txt", text)
    write_data([work / "text"], work / "data", byte_tokenizer())
    print(f"{TokenData.open(work / 'data').tokens:,} bytes of text in {len(gathered)} files", flush=True)


def _train(arguments: argparse.Namespace, world: Mesh, kind: str) -> list[dict[str, Any]]:
    setup = set_up(_config(arguments, world, kind), verify_data=False)
    trainer = Trainer(setup, world)
    rows: list[dict[str, Any]] = []
    for _ in range(arguments.steps):
        result = trainer.step(Observed(measured=True))
        rows.append(_row(kind, setup.plan.kernels.backend, arguments, result))
        if world.rank == 0 and result.step % 20 == 0:
            print(json.dumps(rows[-1]), flush=True)
    trainer.close()
    densest = max(row["density"] for row in rows)
    if kind == "sparse" and densest > arguments.max_density and not arguments.toy:
        raise SystemExit(f"density {densest:.3f} is above --max-density {arguments.max_density}: not sparse enough")
    return rows


def _row(kind: str, backend: str, arguments: argparse.Namespace, result: StepResult) -> dict[str, Any]:
    own = {name: result.values()[name] for name in ("step", "loss", "grad_norm", "learning_rate", "tokens_per_s")}
    implementation = arguments.dense if kind == "dense" else f"ours-{backend}"
    columns = arguments.columns if kind == "sparse" else 0
    fixed = {"kind": kind, "impl": implementation, "seq_len": arguments.seq_len, "seed": arguments.seed}
    return fixed | {"density": result.extra["density"], "columns": columns} | own


def _config(arguments: argparse.Namespace, world: Mesh, kind: str) -> TrainConfig:
    selector = FixedVerticalSlash(columns=arguments.columns, slashes=arguments.slashes)
    pattern = {"selector": selector.name, "settings": selector.settings}
    return parse_config(
        {
            "model": {"path": arguments.work / "model", "random_weights": True},
            "data": {"folder": arguments.work / "data"},
            "seq_len_tokens": arguments.seq_len,
            "steps": arguments.steps,
            "attention": "planned" if kind == "sparse" else arguments.dense,
            "plan": {"block_size": BLOCK_SIZE} | ({"pattern": pattern} if kind == "sparse" else {}),
            "parallel": {"context": world.world_size},
            "microbatches": arguments.microbatches,
            "dtype": "float32" if arguments.toy else "bfloat16",
            "device": world.device.type,
            "seed": arguments.seed,
            "optimizer": {"learning_rate": arguments.learning_rate, "warmup_steps": min(50, arguments.steps // 4)},
        }
    )


def _report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write rows and plot, and say the gap."""
    curves = {kind: [row["loss"] for row in rows if row["kind"] == kind] for kind in ("dense", "sparse")}
    last = {kind: sum(losses[-LAST_STEPS:]) / len(losses[-LAST_STEPS:]) for kind, losses in curves.items()}
    gap = last["sparse"] - last["dense"]
    density = max(row["density"] for row in rows if row["kind"] == "sparse")
    sentence = (
        f"after {arguments.steps} steps of {arguments.microbatches} × {arguments.seq_len} bytes: "
        f"dense {last['dense']:.4f}, sparse {last['sparse']:.4f} "
        f"nats per byte (means of the last {LAST_STEPS} steps), gap {gap:+.4f}; "
        f"sparse density at most {density:.3f}"
    )
    print(sentence)
    path = write_result("learning", rows, folder=arguments.results, gpus=arguments.gpus)
    plot = path.with_suffix(".svg")
    write_atomically(plot, curves_svg(curves, title=f"{sentence} ({datetime.now(UTC):%Y-%m-%d})").encode())
    print(path, plot, sep="\n")


def curves_svg(curves: dict[str, list[float]], *, title: str) -> str:
    """Return loss curves over steps as an SVG page."""
    width, height, left, bottom = 960, 480, 60, 430
    everything = [loss for losses in curves.values() for loss in losses]
    low, high = min(everything), max(everything)
    steps = max(len(losses) for losses in curves.values())

    def place(step: int, loss: float) -> str:
        x = left + (width - left - 20) * step / max(steps - 1, 1)
        return f"{x:.1f},{bottom - (bottom - 50) * (loss - low) / max(high - low, 1e-9):.1f}"

    parts = [f'<text x="{left}" y="20" font-size="11">{title}</text>']
    for number in range(5):
        loss = low + (high - low) * number / 4
        y = place(0, loss).split(",")[1]
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="8" y="{y}" font-size="11">{loss:.2f}</text>')
    for number, (kind, losses) in enumerate(curves.items()):
        points = " ".join(place(step, loss) for step, loss in enumerate(losses))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[kind]}" stroke-width="1.2"/>')
        parts.append(f'<text x="{width - 120}" y="{70 + 18 * number}" fill="{COLORS[kind]}">{kind}</text>')
    parts.append(f'<text x="{width // 2}" y="{bottom + 30}" font-size="11">step (0 … {steps - 1})</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
