"""The verb `sparsering train`: checks a run, shows or exports it, starts its ranks, or is one of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ...traces.errors import InputError
from ...traces.output import offer_report, rounded_parts, say
from .config import TrainConfig, load_config
from .estimate.command import estimated, told_estimate

if TYPE_CHECKING:  # what needs torch is imported when the verb runs, not when it is listed
    from ..comm.mesh import Mesh
    from .estimate.run import RunEstimate
    from .metrics import StepResult
    from .setup import Setup

AS_RANK = "`torchrun … -m sparsering.runtime.train config.yaml`: one rank of a training run."


def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change the configuration, as optimizer.learning_rate=1e-4; may be repeated.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Write a first configuration for this model folder to --output; starts nothing.")
    ] = None,
    data: Annotated[Path, typer.Option(help="With --init: the folder that `sparsering data` wrote.")] = Path("data"),
    output: Annotated[Path, typer.Option("--output", "-o", help="With --init: the file to write.")] = Path(
        "config.yaml"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show it, start nothing.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="With --dry-run: estimate time and memory there, as `sparsering estimate` does."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="With --cluster: the patterns that the run is expected to choose.")
    ] = None,
    export: Annotated[Path | None, typer.Option(help="Write the newest checkpoint as a model folder; no GPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Train a Hugging Face model on long sequences by a plan, on all GPUs of this host or as one rank of torchrun.

    Without RANK in the environment it checks the run, then starts one process per rank; with it, it is a rank.
    Exit code 2 with one line when configuration, plan, model or data cannot be used, before any GPU work.

    In the file, `attention` is planned, or a baseline: dense, dense-zigzag, dense-zigzag-flash4,
    torch-context-parallel. `metrics` writes a JSON line per step and rank (speed, MFU, density, kept mass, imbalance,
    exposed communication, memory, loss) and, if asked, TensorBoard's files. docs/training.md has every key.
    """
    from ..comm.mesh import inherited_environment, is_rank
    from ..comm.start import start_ranks
    from .export import export_checkpoint
    from .setup import set_up

    if init is not None:
        _write_starter(init, data, output)
        return
    if config is None:
        raise InputError("is missing: a YAML file, or --init MODEL_FOLDER to have one written", field="CONFIG")
    loaded = load_config(config, settings or ())
    _require_dry_run(dry_run=dry_run, cluster=cluster, trace=trace)
    if is_rank():
        raise typer.Exit(run_rank(loaded))
    if export is not None:
        written = export_checkpoint(loaded, export)
        typer.echo(json.dumps(written) if as_json else f"step {written['step']} written to {export}")
        return
    setup = set_up(loaded)
    if dry_run:
        found = None if cluster is None else estimated(context, loaded, cluster, trace)
        _show(setup, found, as_json)
        return
    world_size = loaded.parallel.world_size
    code = start_ranks(
        [str(config), *(part for setting in settings or () for part in ("--set", setting))], world_size=world_size,
        environment=inherited_environment(world_size=world_size), module=__name__.rpartition(".")[0],
        restarts=loaded.max_restarts,
    )  # fmt: skip
    if code == 0 and loaded.metrics is not None and not as_json:
        offer_report(loaded.metrics.folder)
    raise typer.Exit(code)


def _write_starter(model: Path, data: Path, output: Path) -> None:
    from .starter import write_starter

    setup = write_starter(model, data, output)
    config = setup.config
    say(
        f"wrote {output}: {setup.facts.parameters:,} parameters, sequences of {config.seq_len_tokens:,} tokens over "
        f"{config.parallel.context} ranks",
        _memory_line(setup.summary()["memory_bytes_per_rank"]),
        f"next: sparsering train {output} --dry-run",
    )


def _require_dry_run(*, dry_run: bool, cluster: str | None, trace: Path | None) -> None:
    """Refuse options that a run would take no notice of."""
    if cluster is not None and not dry_run:
        raise InputError("goes with --dry-run: a run takes the GPUs that are here", field="--cluster")
    if trace is not None and cluster is None:
        raise InputError("goes with --cluster: it is for the estimate alone", field="--trace")


def _show(setup: Setup, estimate: RunEstimate | None, as_json: bool) -> None:
    summary = setup.summary()
    if as_json:
        typer.echo(json.dumps(summary | ({} if estimate is None else {"estimate": estimate.to_json()})))
        return
    say(json.dumps(summary["configuration"], indent=2))
    model = summary["model"]
    worst = max(error for road in model["audit"]["errors"].values() for error in road.values())
    say(
        f"model: {model['type']}, {model['parameters']:,} parameters; audited: a small copy split over two ranks "
        f"equals it alone to {worst:.0e}",
        f"plan: {summary['plan']}",
        f"plan digest: {summary['plan_digest']}",
        *(
            []
            if setup.config.plan.choose.always
            else [f"patterns: chosen in {summary['choosing_steps']:,} of {setup.config.steps:,} steps"]
        ),
        *([f"dense: {summary['dense_steps']:,} of {setup.config.steps:,} steps"] if summary["dense_steps"] else []),
        f"data: {summary['sequences']:,} sequences, {summary['tokens_per_step']:,} tokens a step",
        _memory_line(summary["memory_bytes_per_rank"]),
        *([] if estimate is None else ["", *told_estimate(estimate), ""]),
        "This run can start: nothing was found that would stop it.",
    )


def _memory_line(sizes: dict[str, int]) -> str:
    """Return what a rank needs at its peak and what of it each part is, in whole MB that add up."""
    whole = rounded_parts({name: size for name, size in sizes.items() if name != "total" and size}, 1e6)
    parts = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in whole.items())
    return f"memory per rank: about {sum(whole.values()):,} MB, of which {parts}"


def main() -> int:
    """Train as the rank that the environment says; 2 and one line for unusable input, 1 for a broken run."""
    from ..comm.mesh import speaks

    parser = argparse.ArgumentParser(prog="sparsering.runtime.train", description=AS_RANK)
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], help="change the configuration, as section.key=value")
    try:
        given = parser.parse_args()
        return run_rank(load_config(given.config, given.set))
    except InputError as error:
        if speaks(str(error)):
            print(f"sparsering: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if speaks("interrupted", at_once=True):
            print("sparsering: interrupted", file=sys.stderr)
        return 130


def run_rank(config: TrainConfig) -> int:
    """Train as the rank that the environment says; 0 when all steps are done.

    1, and one line on standard error, when the run broke or ranks were lost. Raises InputError for unusable input.
    """
    from ..comm.lost import RankLost
    from ..comm.mesh import join, leave, naming_lost_ranks
    from .optimizer import TrainingError
    from .writers.writer import NotWritten

    try:
        world = join(device=config.device, timeout_s=config.timeout_s, patience_s=config.patience_s)
        try:
            with naming_lost_ranks(world):
                _train(config, world)
        finally:
            leave()  # while an error is on its way out: then the others are told
    except (TrainingError, NotWritten, RankLost) as error:
        print(f"sparsering: {error}", file=sys.stderr)
        return 1
    return 0


def _train(config: TrainConfig, world: Mesh) -> None:
    """Train and leave in order. Rank 0 alone reads all data once to verify it."""
    from .loop import Trainer
    from .setup import set_up

    setup = set_up(config, verify_data=world.rank == 0)
    if world.world_size != config.parallel.world_size:
        raise InputError(f"{config.parallel.world_size} ranks are configured, {world.world_size} were started",
                         field="parallel")  # fmt: skip
    trainer = Trainer(setup, world)
    first = trainer.resume()
    console = Console(stderr=True, quiet=bool(world.rank))
    if setup.made_here and config.attention == "planned":
        console.print(f"no plan given: default plan {setup.plan.digest[:12]} ({setup.made_here})")
    if first:
        console.print(f"resumed at step {first}")
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left")
    figures = TimeRemainingColumn(), TextColumn("{task.fields[figures]}")
    with Bars(*columns, *figures, console=console) as bars:
        task = bars.add_task("training", total=config.steps, completed=first, figures="")

        def show(result: StepResult) -> None:
            loss = "-" if result.loss is None else f"{result.loss:.4f}"
            told = f"loss {loss}  {result.tokens / result.seconds:,.0f} tokens/s  |g| {result.grad_norm:.3g}"
            bars.update(task, completed=result.step + 1, figures=told)

        trainer.run(show)
    trainer.close()
