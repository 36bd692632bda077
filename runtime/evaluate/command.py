"""The verb `sparsering eval`. torch and transformers are imported when it runs, not when it is listed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ...planner.plan import Plan, load_plan
from ...planner.specs import ModelShape
from ...traces.errors import InputError, UnsupportedError
from ...traces.files import require_output, write_json
from ...traces.progress import shown_progress
from ...traces.yaml_files import read_yaml, with_settings
from ..hf.selector_options import SelectorOptions, with_selector_options
from ..pattern.section import read_patterns
from .settings import LOSS, TASKS, Documents, EvaluationSettings

if TYPE_CHECKING:
    from ...kernels.select.registry import Selector
    from .result import Evaluation

DtypeName = StrEnum("DtypeName", ["auto", "float32", "bfloat16", "float16"])
MAX_ROPE_BYTES = 1 << 16
BLOCK_TOKENS = 128


def evaluate_verb(
    context: typer.Context,
    chosen: SelectorOptions,
    model: Annotated[
        Path, typer.Option(help="Model folder (config.json, safetensors); `train --export` makes one of a checkpoint.")
    ],
    data: Annotated[Path, typer.Option(help="Held-out text: a folder that `sparsering data` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page of it.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of this arm in the result; by default the selector's.")] = None,
    tasks: Annotated[str, typer.Option(help=f"A list of {', '.join(TASKS)}.")] = LOSS,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 65536,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences, drawn by the seed.")] = 16,
    cut_context: Annotated[int, typer.Option(min=0, help="loss: also with so much context; 0: not.")] = 8192,
    documents: Annotated[
        bool, typer.Option("--documents", help="No loss across ends of documents; positions restart with each.")
    ] = False,
    apart: Annotated[bool, typer.Option("--apart", help="With --documents: attention stays within each.")] = False,
    rope_parameters: Annotated[
        str | None, typer.Option(help="In place of the model's: a YAML or JSON mapping, or a file of one.")
    ] = None,
    patterns: Annotated[Path | None, typer.Option(help="Patterns by layer (YAML), not --selector.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan: patterns are chosen as it says, not --selector.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a mask block: 64 or 128 (or the plan's).")] = None,
    dense_too: Annotated[bool, typer.Option(help="With patterns: the same weights densely as well.")] = True,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of sequences with questions, a list; by default 1/4, 1/2, all of them.")
    ] = None,
    needles: Annotated[str, typer.Option(help="needle: how many a sequence has, a list.")] = "1,10",
    depths: Annotated[int, typer.Option(min=1, help="needle: ranges of depth.")] = 5,
    keys: Annotated[int, typer.Option(min=1, help="Questions of a cell, at least.")] = 50,
    hops: Annotated[int, typer.Option(min=1, help="tracking: assignments of a chain.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="auto: the model's on a GPU, float32 on a CPU.")] = DtypeName.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Measure what far context is worth to a model, with dense attention or with patterns (needs torch).

    loss: held-out loss by position, and with the context cut. agreement: how far next-token distributions are from
    dense attention's. reach: which keys far queries attend. needle, tracking, aggregation: questions about what was
    planted in the text, at its end and in mid-document. One process, on one GPU or a CPU; without patterns dense.
    """
    if apart and not documents:
        raise InputError("keeps documents apart: give --documents", field="--apart")
    if not dense_too and chosen.name is None and patterns is None and plan is None:
        raise InputError("leaves nothing to evaluate: give --selector, --patterns or --plan", field="--no-dense-too")
    _require_one(chosen, patterns, plan)
    settings = EvaluationSettings(
        tasks=tuple(tasks.split(",")), seq_len_tokens=seq_len, sequences=sequences, cut_context_tokens=cut_context,
        documents=Documents(loss=documents, positions=documents, attention=apart), dense_too=dense_too,
        block_size=_block_size(block_size, plan), seed=seed, depths=depths, keys=keys, hops=hops,
        lengths=None if lengths is None else _numbers(lengths, "--lengths"), needles=_numbers(needles, "--needles"),
    )  # fmt: skip
    require_output(output, kind="evaluation", key="heldout_loss")
    if report is not None:
        context.obj["require_page"](report)

    result = _evaluated(model, data, settings, _Patterns(chosen, patterns, plan), name=name,
                        rope=_mapping(rope_parameters), placed=(device, str(dtype)))  # fmt: skip
    write_json(output, result.model_dump(mode="json"))
    if report is not None:
        context.obj["write_page"]([output], report)
    if as_json:
        typer.echo(json.dumps(result.row()))
    else:
        _show(result, output, report)


eval_verb = partial(with_selector_options, evaluate_verb, default=None)  # with the options of all selectors


class _Patterns:
    """What says how patterns are chosen: options, a settings file, a plan, or nothing of these."""

    def __init__(self, chosen: SelectorOptions, patterns: Path | None, plan: Path | None) -> None:
        self._chosen, self._patterns, self._plan = chosen, patterns, plan
        self._section = None if patterns is None else read_patterns(patterns)
        self._own = chosen.selector() if chosen.name is not None else None
        self._read = None if plan is None else _read_plan(plan)

    def selector(self, shape: ModelShape) -> Selector | None:
        """Return the selector for a model of this shape; None for dense attention. InputError names the file."""
        from ..pattern.by_layer import planned_selector, selector_by_rules

        try:
            if self._section is not None:
                return selector_by_rules(self._section, layers=shape.layers)
            if self._read is not None:
                self._read.require(model=shape)
                return planned_selector(self._read.pattern, layers=shape.layers)
        except InputError as error:
            raise type(error)(str(error), source=self._patterns or self._plan) from error
        return self._own


def _evaluated(
    model: Path, data: Path, settings: EvaluationSettings, patterns: _Patterns, *, name: str | None,
    rope: dict[str, Any] | None, placed: tuple[str, str],
) -> Evaluation:  # fmt: skip
    """Load and evaluate. placed: the names of device and dtype."""
    from ..data.shards import TokenData
    from ..data.writer import model_tokenizer
    from ..model.load import load_model, pick_device, read_config
    from ..model.rope import replace_rope
    from ..model.shape import model_shape
    from .checks import require_fit
    from .evaluate import evaluate

    opened = TokenData.open(data)
    _, config = read_config(model)
    selector = patterns.selector(model_shape(config))
    tokenizer = None
    if settings.asks_questions and opened.manifest.tokenizer != "byte":
        tokenizer = model_tokenizer(model if model.is_dir() else model.parent)
    require_fit(config, opened, selector, settings, tokenizer)
    if rope is not None:
        replace_rope(config, rope, source=model)
    device, dtype = placed
    loaded = load_model(model, random_weights=False, device=pick_device(device), dtype=dtype, rope_parameters=rope)
    with shown_progress() as progress:
        return evaluate(loaded, opened, selector, settings, name=name, tokenizer=tokenizer, progress=progress)


def _require_one(chosen: SelectorOptions, patterns: Path | None, plan: Path | None) -> None:
    """Refuse more than one that says how patterns are chosen, and settings of a selector that is not named."""
    options = [*(["--selector"] if chosen.name is not None else []), *chosen.given]
    if patterns is not None and plan is not None:
        raise InputError("cannot be given beside --plan", field="--patterns")
    for option in options if patterns is not None or plan is not None else ():
        raise InputError(f"comes from {patterns or plan}", field=option)
    for option in options if chosen.name is None else ():
        raise InputError("is a selector's: give --selector", field=option)


def _read_plan(path: Path) -> Plan:
    """Read a plan that chooses its patterns anew."""
    plan = load_plan(path)
    if plan.pattern.source != "choose":
        raise UnsupportedError("replays a trace, whose patterns are of another text: only plans that choose anew are "
                               "evaluated", source=path, field="pattern.source")  # fmt: skip
    return plan


def _block_size(given: int | None, plan: Path | None) -> int:
    planned = None if plan is None else _read_plan(plan).block_size
    if given is not None and planned is not None and given != planned:
        raise InputError(f"is {given}, the plan's is {planned}", field="--block-size")
    size = planned or given or BLOCK_TOKENS
    if size not in (64, 128):
        raise InputError(f"is {size}, must be 64 or 128", field="--block-size")
    return size


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"{text!r} is no list of numbers such as 1,10", field=option)
    return tuple(int(part) for part in parts)


def _mapping(text: str | None) -> dict[str, Any] | None:
    """Return rope parameters from a mapping in words, or from a file. InputError names the option or the file."""
    if text is None:
        return None
    source = Path(text)
    if text.lstrip().startswith("{"):
        found = with_settings({}, [f"rope_parameters={text}"], source=Path("--rope-parameters"))["rope_parameters"]
    else:
        found = read_yaml(source, max_bytes=MAX_ROPE_BYTES)
    if not isinstance(found, dict):
        raise InputError("is no mapping such as {rope_type: default, rope_theta: 1.0e6}", field="--rope-parameters")
    return found


def _show(result: Evaluation, output: Path, report: Path | None) -> None:
    """Print means, shares and where the rest stands."""
    console = Console(highlight=False, markup=False)
    if result.readings:
        table = Table(box=None, header_style="bold")
        for title in ("quantity", "attention", "tokens", "mean", "standard error"):
            table.add_column(title, justify="left" if title in ("quantity", "attention") else "right")
        for one in result.readings:
            error = "" if one.error is None else f"{one.error:.4f}"
            table.add_row(one.quantity.replace("_", " "), one.arm, f"{one.tokens:,}", f"{one.mean:.4f}", error)
        console.print(table)
    for line in _cell_lines(result):
        console.print(line)
    if result.total_density is not None:
        console.print(f"density, columns counted: {result.total_density:.4f}")
    console.print(f"evaluation: {output}", soft_wrap=True)
    if report is not None:
        console.print(f"report: {report}", soft_wrap=True)


def _cell_lines(result: Evaluation) -> Sequence[str]:
    """Return a line for each task, number planted, length, place of the question and arm: over all depths."""
    groups: dict[tuple[str, int, int, str, str], tuple[int, int]] = {}
    for one in result.cells:
        key = (one.task, one.planted, one.length_tokens, one.question, one.arm)
        found, asked = groups.get(key, (0, 0))
        groups[key] = found + one.found, asked + one.asked
    return [
        f"{task} × {planted}, {length:,} tokens, question {place}, {arm}: {found} of {asked}"
        for (task, planted, length, place, arm), (found, asked) in groups.items()
    ]
