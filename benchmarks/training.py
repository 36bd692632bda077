"""Whole training steps on the GPUs of one host: planned sparse attention against dense rings, in one trainer.

Qwen2.5-3B's shape with random weights on random tokens. Sparse runs replay seeded masks of a stated density, and still
pay for choosing: the selector runs in every layer and its choice is thrown away. Attention (which includes choosing)
is timed apart from everything else, on every rank, and so is what it waits for other ranks (`exposed`; PyTorch's own
ring cannot be seen into); rows hold the slowest rank's figures, each figure its own slowest rank.

    python -m sparsering.benchmarks.training --gpus 8 --impl ours --density 0.05 0.02
    python -m sparsering.benchmarks.training --gpus 8 --impl ours dense-zigzag torch-context-parallel \\
        --fused-layers --whole-layers 6 --dense-whole-layers 0 --dense-steps 1 --dense-warmups 0
    python -m sparsering.benchmarks.training --merge results/training-*.json
    python -m sparsering.benchmarks.training --toy            # two gloo processes on CPUs, a tiny model

Every call is a process group of its own; `--merge` puts result files side by side. All implementations start from the
same weights and tokens: `loss` and `grad_norm` of the dense ones must agree.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels.mask import AttentionMask
from ..kernels.select.vertical_slash import FixedVerticalSlash
from ..planner.layouts.registry import parse_layout
from ..planner.plan import AttentionSpec, KernelSpec, ModelShape, Plan, make_plan
from ..planner.schedule.placement import striped
from ..runtime.baselines.flash4 import NAME as FLASH4_RING
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import start_ranks
from ..runtime.data.writer import Tokenizer, write_data
from ..runtime.pattern.selectors import pattern_chosen_by
from ..runtime.train.config import TrainConfig, parse_config
from ..runtime.train.loop import Trainer
from ..runtime.train.metrics import StepResult
from ..runtime.train.patterns import Observed
from ..runtime.train.setup import set_up
from ..traces.files import read_json, write_json
from .lib.common import RESULTS, ResultFile, require_flash4_ring
from .lib.masks import density_of, slash_mask

IMPLEMENTATIONS = ("ours", "ours-dense", "dense-zigzag", FLASH4_RING, "torch-context-parallel")
ATTENTION_OF = {"ours": "planned", "ours-dense": "dense"}
BLOCK_SIZE = 128
QWEN25_3B: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "max_position_embeddings": 2097152, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
    "initializer_range": 0.02, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
TOY = QWEN25_3B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MEMORY = ("loss", "offload", "fused_layers", "whole_layers")  # options that are the configuration's own
# Options that stand in every row.
NOTED = ("layers", "steps", "warmups", "fused_layers", "whole_layers", "verify_every", "seed")
UTILISATIONS = ("mfu_actual", "mfu_dense_equivalent")
Masks = list[AttentionMask]


def main() -> None:
    """Start the ranks, or be one."""
    arguments = parser().parse_args()
    if arguments.merge:
        print(_table([row for path in arguments.merge for row in read_json(path)["rows"]]))
        return
    arguments.model, arguments.dtype = QWEN25_3B, "bfloat16"
    if arguments.toy:
        arguments.model, arguments.dtype = TOY, "float32"
        arguments.gpus, arguments.layers = min(arguments.gpus, 2), 2
        arguments.seq_len, arguments.columns = min(arguments.seq_len, 2048), 64
    if "RANK" not in os.environ:
        require_flash4_ring(arguments.impl, head_dim=_shape(1, QWEN25_3B).head_dim, toy=arguments.toy)
        with tempfile.TemporaryDirectory(prefix="sparsering-training-") as folder:
            raise SystemExit(_start(arguments, arguments.work or Path(folder)))
    world = join(device="cpu" if arguments.toy else None, timeout_s=540)
    result = ResultFile("training", folder=arguments.results, gpus=arguments.gpus)
    rows = result.write_as_they_come(_measure_all(arguments, world), json.dumps, first_rank=world.rank == 0)
    if world.rank == 0:
        print(_table(rows), result.path, sep="\n")
    leave()


def parser() -> argparse.ArgumentParser:
    """Return the command line: what a result's `command` was parsed by."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gpus", type=int, default=8)
    options.add_argument("--impl", nargs="+", default=["ours"], choices=IMPLEMENTATIONS)
    options.add_argument("--seq-len", type=int, default=524288)
    options.add_argument("--density", type=float, nargs="+", default=[0.05, 0.02],
                        help="asked of the mask's slashes; at 0.05 and 0.02 masks have 6.3 %% and 2.6 %%")  # fmt: skip
    options.add_argument("--columns", type=int, default=1024)
    options.add_argument("--slashes", type=int, default=1024, help="token distances that the paid-for choice takes")
    options.add_argument("--layout", default="gather:chunks=2", help="name:parameter=value,…; forward/backward")
    options.add_argument("--backend", default=None, help="kernels; default: triton on GPUs, blockwise on CPUs")
    options.add_argument("--layers", type=int, default=36)
    options.add_argument("--steps", type=int, default=3, help="measured steps")
    options.add_argument("--warmups", type=int, default=1)
    options.add_argument("--dense-steps", type=int, help="measured steps of dense rings (slow); default: as all")
    options.add_argument("--dense-warmups", type=int, help="warm-ups of dense rings; default: as all")
    options.add_argument("--loss", default="auto", choices=["auto", "chunked", "liger"])
    options.add_argument("--fused-layers", action="store_true", help="liger-kernel's norms, rotation and MLP, for all")
    options.add_argument("--whole-layers", type=int, default=0, help="layers that are not recomputed, as memory allows")
    options.add_argument("--dense-whole-layers", type=int, help="the same for dense rings; default: as all")
    options.add_argument("--offload", action="store_true", help="what checkpointing keeps waits in host memory")
    options.add_argument("--distinct-masks", type=int, default=4, help="masks drawn; layers take them in turn")
    options.add_argument("--verify-every", type=int, help="steps between checks of the run by itself; default: none")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--toy", action="store_true", help="two gloo processes and a tiny model, to try the road")
    options.add_argument("--merge", type=Path, nargs="+", help="result files to show side by side")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--work", type=Path, help="folder for the model configuration and the random tokens")
    return options


def _start(arguments: argparse.Namespace, work: Path) -> int:
    """Write the model's configuration and enough random tokens, and start the ranks."""
    model = arguments.model
    write_json(work / "model" / "config.json", model | {"num_hidden_layers": arguments.layers})
    if not (work / "data" / "manifest.json").exists():
        tokens = np.random.default_rng(arguments.seed).integers(0, model["vocab_size"], 4 * arguments.seq_len)
        np.save(work / "tokens.npy", tokens)
        write_data([work / "tokens.npy"], work / "data", Tokenizer("random", model["vocab_size"]))
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return start_ranks(
        [*sys.argv[1:], "--work", str(work)], world_size=arguments.gpus, environment=environment,
        module="sparsering.benchmarks.training",
    )  # fmt: skip


def _measure_all(arguments: argparse.Namespace, world: Mesh) -> Iterator[dict[str, Any]]:
    for implementation in arguments.impl:
        for density in arguments.density if implementation == "ours" else [None]:
            yield _measure(arguments, world, implementation, density)
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _measure(arguments: argparse.Namespace, world: Mesh, implementation: str, density: float | None) -> dict[str, Any]:
    began = time.perf_counter()
    arguments = _effort(arguments, implementation)
    masks = _masks(arguments, density, world.device) if density is not None else None
    config = _config(arguments, world, implementation, masks)
    setup = set_up(config, verify_data=False)
    replayed = None if masks is None else [masks[layer % len(masks)] for layer in range(arguments.layers)]
    trainer = Trainer(setup, world, replayed=replayed)
    prepared_s = time.perf_counter() - began
    for _ in range(arguments.warmups):
        trainer.step()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    results, own = _steps(trainer, arguments.steps)
    trainer.close()
    own |= _medians(results)
    everyone = world.collect(f"benchmark {implementation} {density}", own)
    if everyone is None:
        return {}
    worst = {name: max(values[name] or 0.0 for values in everyone) for name in own}
    last, step_ms = results[-1], worst["step_ms"]
    used = {name: last.extra[name] for name in UTILISATIONS}  # in last.seconds; a row has them in step_ms
    return {
        "impl": _name(implementation, setup.plan.kernels.backend, world.device.type),
        "seq_len": config.seq_len_tokens,
        "density": 1.0 if masks is None else round(sum(map(density_of, masks)) / len(masks), 5),
        "columns": 0 if masks is None else arguments.columns,
        "world_size": world.world_size,
        "layout": arguments.layout if implementation == "ours" else "",
        "tokens_per_s": last.tokens / step_ms * 1e3,
        **{name: share * last.seconds * 1e3 / step_ms if share else None for name, share in used.items()},
        "memory_bytes": int(worst["memory_bytes"]),
        **{name: value for name, value in worst.items() if name.endswith("_ms")},
        "other_ms": step_ms - worst["attention_ms"],
        "loss": last.loss,
        "grad_norm": last.grad_norm,
        **{name: value for name, value in worst.items() if name.startswith("excess_")},
        **{name: getattr(arguments, name) for name in NOTED},
        "prepared_s": prepared_s,
        "plan_digest": setup.plan.digest,
    }


def _steps(trainer: Trainer, steps: int) -> tuple[list[StepResult], dict[str, float]]:
    """Do the measured steps; return them, milliseconds from one to the next, and what checks found.

    `excess_out` and so on: the largest error over its bound that any check of the steps' attention saw.
    """
    results, excesses, device = [], {}, trainer.world.device
    began = time.perf_counter()
    for _ in range(steps):
        due = trainer.check is not None and trainer.check.is_due(trainer.next_step)
        results.append(trainer.step(Observed(measured=True)))
        if due and trainer.check is not None and trainer.check.attention is not None:
            for one in trainer.check.attention.compared:
                name = f"excess_{one.quantity}"
                excesses[name] = max(excesses.get(name, 0.0), float(one.excess))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results, {"between_ms": 1e3 * (time.perf_counter() - began) / steps} | excesses


def _effort(arguments: argparse.Namespace, implementation: str) -> argparse.Namespace:
    """Return the arguments with the steps and whole layers of this implementation."""
    own = argparse.Namespace(**vars(arguments))
    if not implementation.startswith("ours"):
        for name in ("steps", "warmups", "whole_layers"):
            stated = getattr(arguments, f"dense_{name}")
            setattr(own, name, getattr(arguments, name) if stated is None else stated)
    return own


def _medians(results: list[StepResult]) -> dict[str, float]:
    parts = {f"{part}_ms": [r.parts_ms[part] for r in results] for part in results[0].parts_ms}
    parts["attention_ms"] = [r.parts_ms["attention_forward"] + r.parts_ms["attention_backward"] for r in results]
    parts["step_ms"] = [r.seconds * 1e3 for r in results]
    exposed = [r.extra["exposed_communication_ms"] for r in results]
    if None not in exposed:  # not of layers that are CUDA graphs
        parts["exposed_communication_ms"] = exposed
    medians = {name: statistics.median(values) for name, values in parts.items()}
    return medians | {"memory_bytes": float(results[-1].extra["memory_bytes"] or 0)}


def _masks(arguments: argparse.Namespace, density: float, device: torch.device) -> Masks:
    shape = {"heads": arguments.model["num_attention_heads"], "block": BLOCK_SIZE}
    seeds = range(arguments.seed, arguments.seed + min(arguments.distinct_masks, arguments.layers))
    drawn = (slash_mask(arguments.seq_len, density, arguments.columns, **shape, seed=seed) for seed in seeds)
    return [mask.to(device) for mask in drawn]


def _config(arguments: argparse.Namespace, world: Mesh, implementation: str, masks: Masks | None) -> TrainConfig:
    work = arguments.work
    plan: dict[str, Any] = {"backend": arguments.backend}
    if masks is not None:
        plan["file"] = work / "plan.json"
        if world.rank == 0:
            _plan(arguments, world).save(plan["file"])
    if implementation == "ours-dense":
        plan["layout"] = arguments.layout.partition(":")[0]
    world.broadcast(f"plan {implementation} {masks and density_of(masks[0])}", "written")  # others wait for the file
    return parse_config(
        {
            "model": {"path": work / "model", "random_weights": True},
            "data": {"folder": work / "data"},
            "seq_len_tokens": arguments.seq_len,
            "steps": arguments.warmups + arguments.steps,
            "attention": ATTENTION_OF.get(implementation, implementation),
            "plan": plan,
            "parallel": {"data": 1, "context": world.world_size},
            "dtype": arguments.dtype,
            "device": world.device.type,
            "seed": arguments.seed,
            "optimizer": {"learning_rate": 1e-5, "warmup_steps": 0},
            "memory": {name: getattr(arguments, name) for name in MEMORY},
            "verify": arguments.verify_every and {"every_steps": arguments.verify_every},
        }
    )


def _shape(layers: int, model: dict[str, Any]) -> ModelShape:
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    return ModelShape(layers=layers, heads=heads, kv_heads=kv_heads, head_dim=model["hidden_size"] // heads)


def _plan(arguments: argparse.Namespace, world: Mesh) -> Plan:
    forward, _, backward = arguments.layout.partition("/")
    selector = FixedVerticalSlash(columns=arguments.columns, slashes=arguments.slashes)
    backend = arguments.backend or ("triton" if world.device.type == "cuda" else "blockwise")
    return make_plan(
        attention=AttentionSpec(
            model=_shape(arguments.layers, arguments.model), seq_len_tokens=arguments.seq_len, block_size=BLOCK_SIZE,
            dtype=arguments.dtype, columns_capacity=arguments.columns,
        ),
        placement=striped(seq_len_tokens=arguments.seq_len, world_size=world.world_size, granularity_tokens=BLOCK_SIZE),
        forward=parse_layout(forward),
        backward=parse_layout(backward or forward),
        pattern=pattern_chosen_by(selector),
        kernels=KernelSpec.model_validate({"backend": backend}),
    )  # fmt: skip


def _name(implementation: str, backend: str, device: str) -> str:
    if implementation == "dense-zigzag":
        return "dense-zigzag-cudnn" if device == "cuda" else "dense-zigzag-cpu"
    return f"{implementation}-{backend}" if implementation.startswith("ours") else implementation


def _table(rows: list[dict[str, Any]]) -> str:
    """One line a row, with speed against every dense baseline of the same length."""
    lines = [f"{'impl':26}{'seq_len':>9}{'density':>9}{'step ms':>10}{'attn ms':>10}{'other ms':>10}"
             f"{'choose':>8}{'exposed':>9}{'MFU':>7}{'dense-eq':>9}{'GiB':>7}  against"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["seq_len"], -r["step_ms"])):
        dense = [r for r in rows if r["seq_len"] == row["seq_len"] and r["impl"].startswith(("dense", "torch"))]
        against = ", ".join(f"{r['impl']} ×{r['step_ms'] / row['step_ms']:.2f}" for r in dense if r is not row)
        mfu = [f"{row[name]:.3f}" if row[name] else "-" for name in UTILISATIONS]
        exposed = row.get("exposed_communication_ms")
        waited = "-" if exposed is None else f"{exposed:.1f}"
        lines.append(
            f"{row['impl']:26}{row['seq_len']:9}{row['density']:9.4f}{row['step_ms']:10.1f}{row['attention_ms']:10.1f}"
            f"{row['other_ms']:10.1f}{row['choosing_ms']:8.1f}{waited:>9}{mfu[0]:>7}{mfu[1]:>9}"
            f"{row['memory_bytes'] / 2**30:7.1f}  {against}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
