"""`torchrun … -m sparsering.runtime.train config.yaml`: one rank of a training run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ...traces.errors import InputError
from ..comm.failures import naming_lost_ranks
from ..comm.lost import RankLost
from ..comm.mesh import Mesh, join, leave
from .config import TrainConfig, load_config
from .loop import Trainer
from .metrics import StepResult
from .optimizer import TrainingError
from .setup import set_up


def main() -> int:
    """Train as the rank that the environment says; 2 and one line for unusable input, 1 for a broken run."""
    parser = argparse.ArgumentParser(prog="sparsering.runtime.train", description=__doc__)
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
    if setup.resolved.made_here and config.attention == "planned":
        console.print(f"no plan given: default plan {setup.plan.digest[:12]} ({setup.resolved.made_here})")
    if first:
        console.print(f"resumed at step {first}")
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, TextColumn("{task.fields[figures]}"), console=console) as bars:
        task = bars.add_task("training", total=config.steps, completed=first, figures="")
        trainer.run(lambda result: bars.update(task, completed=result.step + 1, figures=_figures(result)))
    with naming_lost_ranks(world):
        trainer.close()


def _figures(result: StepResult) -> str:
    loss = "-" if result.loss is None else f"{result.loss:.4f}"
    return f"loss {loss}  {result.tokens / result.seconds:,.0f} tokens/s  |g| {result.grad_norm:.3g}"


if __name__ == "__main__":
    sys.exit(main())
