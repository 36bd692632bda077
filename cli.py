"""The command line: it only registers verbs. What a verb does lives in its house.

Adding a verb is a row in `VERBS` and a typer-annotated function in the house's `commands.py` or `<verb>_command.py`.
A verb's module is imported when the verb is used, so `sparsering --help` is quick, and `plan` or `simulate` work
where torch is not installed.

Houses do not import each other against the direction of docs/architecture.md. What a verb needs from a house that
its own may not see is *injected* here: a row in `SERVICES` names it, and a verb that wants it takes the context:

    def plan(context: typer.Context, trace: Path, ...) -> None:
        evaluator = context.obj["evaluator"]   # imported now; the house annotates it with a protocol of its own

Errors: `InputError` from anywhere becomes one line on stderr and exit code 2; a missing optional package becomes one
line that says what to install and exit code 1. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from . import __version__
from .traces.errors import InputError

PACKAGE = __package__ or "sparsering"
GPU_EXTRA = {"liger_kernel", "safetensors", "torch", "transformers", "triton"}


@dataclass(frozen=True, kw_only=True)
class Verb:
    """Where a verb's function lives, and its line in `sparsering --help`.

    made: the function returns the verb, whose options depend on what is registered.
    """

    module: str
    function: str
    help: str
    made: bool = False


VERBS = {
    "audit": Verb(
        module="runtime.hf.audit_command",
        function="audit",
        help="Say whether a model is right over several ranks (needs torch).",
    ),
    "capture": Verb(
        module="runtime.hf.capture_command",
        function="capture_verb",
        help="Record what a model attends to on your text (needs torch).",
        made=True,
    ),
    "synthesize": Verb(
        module="traces.commands",
        function="synthesize",
        help="Write a synthetic trace: patterns of a known kind, seeded.",
    ),
    "inspect": Verb(
        module="traces.commands",
        function="inspect",
        help="Check every byte of a trace and show what it holds.",
    ),
    "cluster": Verb(
        module="planner.cluster_command",
        function="cluster",
        help="Turn a topology and nccl-tests into a cluster file.",
    ),
    "plan": Verb(
        module="planner.commands",
        function="plan",
        help="Find the best placement and layout for a trace and a cluster.",
    ),
    "check": Verb(
        module="planner.commands",
        function="check",
        help="Prove a plan complete, timely and free of deadlock.",
    ),
    "simulate": Verb(
        module="simulator.commands",
        function="simulate",
        help="Play a plan in simulated time; write its timeline.",
    ),
    "run": Verb(
        module="runtime.run.command",
        function="run",
        help="Execute a plan here and measure its timeline (needs torch).",
    ),
    "calibrate": Verb(
        module="runtime.calibrate.command",
        function="calibrate",
        help="Measure kernels here, as a cluster file (needs torch).",
    ),
    "data": Verb(
        module="runtime.data.command",
        function="data",
        help="Turn text into token shards to train on (needs torch).",
    ),
    "train": Verb(
        module="runtime.train.command",
        function="train",
        help="Train a model on long sequences by a plan (needs torch).",
    ),
    "compare": Verb(
        module="simulator.commands",
        function="compare",
        help="Set two timelines side by side, phase by phase.",
    ),
    "validate": Verb(
        module="simulator.validate_command",
        function="validate",
        help="Set measured results beside predictions; judge them.",
    ),
    "demo": Verb(
        module="runtime.demo.command",
        function="demo",
        help="The whole road on this machine, no GPU (needs torch).",
    ),
    "doctor": Verb(
        module="kernels.commands",
        function="doctor",
        help="Show which kernel backends work here (needs torch).",
    ),
}

# service -> (module, name): what one house offers to verbs of houses that must not import it.
SERVICES = {
    "evaluator": ("simulator.engine", "simulate"),
    "simulate_plan": ("simulator.simulate_plan", "simulate_plan"),
    "timeline_metrics": ("simulator.metrics", "timeline_metrics"),
    "write_report": ("simulator.report.page", "write_report"),
}


class Services(Mapping[str, Any]):
    """The rows of `SERVICES`, imported when asked for. Verbs find it as `context.obj`."""

    def __getitem__(self, name: str) -> Any:
        module, attribute = SERVICES[name]
        return getattr(import_module(f"{PACKAGE}.{module}"), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(SERVICES)

    def __len__(self) -> int:
        return len(SERVICES)


class LazyGroup(TyperGroup):
    """Lists all verbs from the table; imports a verb's house only when that verb is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else _command(name), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"sparsering: {error}", err=True)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            typer.echo(f"sparsering: {_advice(error)}", err=True)
            raise typer.Exit(1) from error


def _command(name: str) -> Any:
    """Import the verb's function and return it as a command."""
    verb = VERBS[name]
    function = getattr(import_module(f"{PACKAGE}.{verb.module}"), verb.function)
    function = function() if verb.made else function
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=function.__doc__ or verb.help)(function)
    return typer.main.get_command(single)


def _advice(error: ModuleNotFoundError) -> str:
    """One line for a module that may rightly be absent; any other missing module is raised again, as the bug it is."""
    missing = error.name or ""
    if missing.partition(".")[0] in GPU_EXTRA:
        return f"this needs {missing}: pip install 'sparsering[gpu]'"
    if missing in {f"{PACKAGE}.{verb.module}" for verb in VERBS.values()}:
        return f"{missing} is not part of this installation"
    raise error


app = typer.Typer(
    cls=LazyGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsering {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Record a model's dynamic sparse attention, plan how to spread it over GPUs, run that plan."""
    context.obj = Services()


def _listed() -> None:
    """Stand in for a verb in the list; `LazyGroup.resolve_command` puts the real one in its place."""


for _name, _verb in VERBS.items():
    app.command(_name, help=_verb.help)(_listed)


def main() -> None:
    """Entry point of the console script `sparsering`."""
    app(prog_name="sparsering")


if __name__ == "__main__":
    main()
