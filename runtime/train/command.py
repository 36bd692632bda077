"""The verb `sparsering train`: checks a run, shows or exports it, or starts its ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..comm.mesh import inherited_environment, is_rank
from ..comm.start import run_to_its_end
from .__main__ import run_rank
from .config import TrainConfig, load_config
from .export import export_checkpoint
from .setup import Setup, set_up


def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show it, start nothing.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the newest checkpoint as a model folder; no GPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Train a Hugging Face model on long sequences by a plan, on all GPUs of this host or as one rank of torchrun.

    Without RANK in the environment it checks the run, then starts torchrun with one process per rank; with it, it is a
    rank. Exit code 2 with one line when configuration, plan, model or data cannot be used, before any GPU work.

    In the file, `attention` is planned, or a baseline: dense, dense-zigzag, dense-zigzag-flash4,
    torch-context-parallel. `metrics` writes a JSON line per step and rank (speed, MFU, density, kept mass, imbalance,
    exposed communication, memory, loss) and, if asked, TensorBoard's files. docs/training.md has every key.
    """
    loaded = load_config(config)
    if is_rank():
        raise typer.Exit(run_rank(loaded))
    if export is not None:
        written = export_checkpoint(loaded, export)
        typer.echo(json.dumps(written) if as_json else f"step {written['step']} written to {export}")
        return
    setup = set_up(loaded)
    if dry_run:
        _show(setup, as_json)
        return
    raise typer.Exit(start(config, loaded))


def start(path: Path, config: TrainConfig) -> int:
    """Start torchrun on this host, one process per rank; return its exit code. Killed workers restart all ranks."""
    world = config.parallel.world_size
    assert __package__ is not None
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
        "--max-restarts", str(config.max_restarts), "-m", __package__, str(path),
    ]  # fmt: skip
    environment = inherited_environment(world_size=world) | {"PYTHONSAFEPATH": "1"}
    return run_to_its_end(command, environment=environment)


def _show(setup: Setup, as_json: bool) -> None:
    summary = setup.summary()
    if as_json:
        typer.echo(json.dumps(summary))
        return
    console = Console()
    console.print_json(json.dumps(summary["configuration"]))
    model, memory = summary["model"], summary["memory_bytes_per_rank"]
    worst = max(error for road in model["audit"]["errors"].values() for error in road.values())
    console.print(f"model: {model['type']}, {model['parameters']:,} parameters; audited: a small copy split over two "
                  f"ranks equals it alone to {worst:.0e}")  # fmt: skip
    console.print(f"plan: {summary['plan']}")
    console.print(f"plan digest: {summary['plan_digest']}")
    console.print(f"data: {summary['sequences']:,} sequences, {summary['tokens_per_step']:,} tokens a step")
    console.print("memory per rank: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in memory.items()))
