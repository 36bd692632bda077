"""The verb `sparsering train`: checks a run, shows or exports it, starts its ranks, or is one of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ...traces.errors import InputError
from ..comm.lost import RankLost
from ..comm.mesh import Mesh, inherited_environment, is_rank, join, leave, naming_lost_ranks
from ..comm.start import run_to_its_end
from .config import TrainConfig, load_config
from .export import export_checkpoint
from .loop import Trainer
from .metrics import StepResult
from .optimizer import TrainingError
from .setup import Setup, set_up

AS_RANK = "`torchrun … -m sparsering.runtime.train config.yaml`: one rank of a training run."


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
    world_size = loaded.parallel.world_size
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size),
        "--max-restarts", str(loaded.max_restarts), "-m", __name__.rpartition(".")[0], str(config),
    ]  # fmt: skip
    environment = inherited_environment(world_size=world_size) | {"PYTHONSAFEPATH": "1"}
    raise typer.Exit(run_to_its_end(command, environment=environment))


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


def main() -> int:
    """Train as the rank that the environment says; 2 and one line for unusable input, 1 for a broken run."""
    parser = argparse.ArgumentParser(prog="sparsering.runtime.train", description=AS_RANK)
    parser.add_argument("config", type=Path, help="the run's YAML file")
    try:
        return run_rank(load_config(parser.parse_args().config))
    except InputError as error:
        print(f"sparsering: {error}", file=sys.stderr)
        return 2


def run_rank(config: TrainConfig) -> int:
    """Train as the rank that the environment says; 0 when all steps are done.

    1, and one line on standard error, when the run broke or ranks were lost. Raises InputError for unusable input.
    """
    try:
        world = join(device=config.device, timeout_s=config.timeout_s, patience_s=config.patience_s)
        try:
            _train(config, world)
        finally:
            leave()  # while an error is on its way out: then there is no goodbye
    except (TrainingError, RankLost) as error:
        print(f"sparsering: {error}", file=sys.stderr)
        return 1
    return 0


def _train(config: TrainConfig, world: Mesh) -> None:
    """Train and leave in order. Rank 0 alone reads all data once to verify it."""
    setup = set_up(config, verify_data=world.rank == 0)
    if world.world_size != config.parallel.world_size:
        raise InputError(f"{config.parallel.world_size} ranks are configured, {world.world_size} were started",
                         field="parallel")  # fmt: skip
    with naming_lost_ranks(world):
        trainer = Trainer(setup, world)
        first = trainer.resume()
    console = Console(stderr=True, quiet=bool(world.rank))
    if setup.made_here and config.attention == "planned":
        console.print(f"no plan given: default plan {setup.plan.digest[:12]} ({setup.made_here})")
    if first:
        console.print(f"resumed at step {first}")
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, TextColumn("{task.fields[figures]}"), console=console) as bars:
        task = bars.add_task("training", total=config.steps, completed=first, figures="")

        def show(result: StepResult) -> None:
            loss = "-" if result.loss is None else f"{result.loss:.4f}"
            told = f"loss {loss}  {result.tokens / result.seconds:,.0f} tokens/s  |g| {result.grad_norm:.3g}"
            bars.update(task, completed=result.step + 1, figures=told)

        trainer.run(show)
    with naming_lost_ranks(world):
        trainer.close()
