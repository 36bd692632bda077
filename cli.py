"""The command line: it only registers verbs. What a verb does lives in its house.

Adding a verb is a row in `VERBS` and a typer-annotated function in the house's `commands.py` or `<verb>_command.py`.
A verb's module is imported when the verb is used, so `sparsering --help` is quick, and `plan` or `simulate` work
where torch is not installed.

Houses do not import each other against the direction of docs/architecture.md. What a verb needs from a house that
its own may not see is *injected* here: a row in `SERVICES` names it, and a verb that wants it takes the context:

    def plan(context: typer.Context, trace: Path, ...) -> None:
        evaluator = context.obj["evaluator"]   # imported now; the house annotates it with a protocol of its own

Errors: `InputError` from anywhere, and options that cannot be read, become one line on stderr and exit code 2; a
missing optional package, or memory that does not suffice, one line and exit code 1; Ctrl-C one line and exit code 130.
Everything else is a bug and keeps its traceback. Where several ranks would say the same, the first of a host says it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import typer
import typer.main
from typer.core import TyperGroup

from . import __version__
from .signals import heeded, never_misread
from .traces.errors import InputError, did_you_mean, unknown_name

PACKAGE = __package__ or "sparsering"
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # typer does not export it
REFUSED_BY_THE_SYSTEM = (
    errno.EACCES, errno.EDQUOT, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS
)  # fmt: skip
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
    "estimate": Verb(
        module="runtime.train.estimate.command",
        function="estimate",
        help="Say what a training run will take (needs torch).",
    ),
    "eval": Verb(
        module="runtime.evaluate.command",
        function="eval_verb",
        help="Loss, retrieval, agreement: dense or sparse (needs torch).",
        made=True,
    ),
    "compare": Verb(
        module="simulator.commands",
        function="compare",
        help="Set two timelines side by side, phase by phase.",
    ),
    "export": Verb(
        module="traces.exporting.command",
        function="export",
        help="Write a timeline as other tools read it, a file per rank.",
    ),
    "validate": Verb(
        module="simulator.validate_command",
        function="validate",
        help="Set measured results beside predictions; judge them.",
    ),
    "report": Verb(
        module="simulator.report.command",
        function="report",
        help="One HTML page on any files of ours: does planning help?",
    ),
    "demo": Verb(
        module="runtime.demo.command",
        function="demo",
        help="The whole road on this machine, no GPU (needs torch).",
    ),
    "doctor": Verb(
        module="runtime.doctor.command",
        function="doctor",
        help="Show what works here, and what mends what does not.",
    ),
}

# service -> (module, name): what one house offers to verbs of houses that must not import it.
SERVICES = {
    "evaluator": ("simulator.engine", "simulate"),
    "simulate_plan": ("simulator.simulate_plan", "simulate_plan"),
    "verb_modules": ("cli", "verb_modules"),
    "timeline_metrics": ("simulator.metrics", "timeline_metrics"),
    "write_report": ("simulator.report.demo", "write_report"),
    "write_page": ("simulator.report.page", "write_page"),
    "require_page": ("simulator.report.page", "require_page"),
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
        if args and args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise unknown_name(args[0], VERBS, field="verb")
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else _command(name), rest

    def make_context(self, *args: Any, **named: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **named)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    """Make what a user can cause one line on stderr and an exit code."""
    try:
        with never_misread(InputError, OSError, ImportError):
            yield
    except KeyboardInterrupt as error:
        _end(128 + signal.SIGINT, "interrupted", error)
    except InputError as error:
        _end(2, str(error), error)
    except ModuleNotFoundError as error:
        _end(1, _advice(error), error)
    except MemoryError as error:
        _end(1, f"not enough memory: {error}".rstrip(": "), error)
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        if hasattr(error, "option_name") and _lacks_options(error):
            _end(1, _needs("torch"), error)
        _end(2, _usage_problem(error), error)
    except OSError as error:
        if error.errno == errno.ENOENT and "usable temporary directory" in str(error):
            _end(2, "TMPDIR: no folder for temporary files can be written to (disks may be full)", error)
        if error.filename is None or error.errno not in REFUSED_BY_THE_SYSTEM:
            raise
        _end(2, f"{error.filename}: {(error.strerror or '').lower()}", error)


def _end(code: int, problem: str, cause: BaseException) -> NoReturn:
    """Say the line, unless another rank does, and end with the code."""
    mesh: Any = sys.modules.get(f"{PACKAGE}.runtime.comm.mesh")  # not imported: no other ranks
    if mesh is None or mesh.speaks(problem, at_once=isinstance(cause, KeyboardInterrupt)):
        typer.echo(f"sparsering: {problem}", err=True)
    raise typer.Exit(code) from cause


def _usage_problem(error: Any) -> str:
    """Return what is wrong with the options, in one line: which, its value, what is allowed, what was meant perhaps."""
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        known = [name for one in error.ctx.command.params for name in one.opts] if error.ctx else []
        return f"{option}: there is no such option{did_you_mean(option, known)}"
    problem = " ".join((error.message or "is missing").split()).rstrip(".").removeprefix("Value error, ")
    refused = getattr(error.__cause__, "errors", list)()  # of the library that reads the values
    if problem.startswith("Input should be "):
        problem = f"must be {problem.removeprefix('Input should be ')}, not {refused[0]['input'] if refused else ''}"
    parameter = getattr(error, "param", None)
    where = getattr(error, "param_hint", None) or (parameter and max(parameter.opts, key=len))
    if where and not where.startswith("-"):
        where = where.upper()  # as --help writes an argument
    value, between, choices = problem.partition(" is not one of ")
    if between:
        return str(unknown_name(value.strip("'"), choices.split("'")[1::2], field=where))
    return f"{where}: {problem}" if where else problem


def verb_modules() -> dict[str, str]:
    """Return the module of every verb, as "planner.commands": from its house follows what it needs."""
    return {name: verb.module for name, verb in VERBS.items()}


def _command(name: str) -> Any:
    """Import the verb's function and return it as a command."""
    verb = VERBS[name]
    function = getattr(import_module(f"{PACKAGE}.{verb.module}"), verb.function)
    function = function() if verb.made else function
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=function.__doc__ or verb.help)(function)
    return typer.main.get_command(single)


def _needs(package: str) -> str:
    return f"this needs {package}, which is not installed: `sparsering doctor` prints the command that installs it"


def _lacks_options(error: Any) -> bool:
    """Whether the verb has more options where torch is installed, which it is not."""
    verb = VERBS.get(error.ctx.info_name) if error.ctx else None
    return verb is not None and verb.made and find_spec("torch") is None


def _advice(error: ModuleNotFoundError) -> str:
    """One line for a module that may rightly be absent; any other missing module is raised again, as the bug it is."""
    missing = error.name or ""
    if missing.partition(".")[0] in GPU_EXTRA:
        return _needs(missing)
    if missing in {f"{PACKAGE}.{verb.module}" for verb in VERBS.values()}:
        return f"{missing} is not part of this installation"
    raise error


app = typer.Typer(
    cls=LazyGroup, add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
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
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is said by us, in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages long
    with heeded():
        app(prog_name="sparsering")


if __name__ == "__main__":
    main()
