"""The verb `sparsering capture`. torch and transformers are imported when it runs, not when it is listed."""

from __future__ import annotations

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...traces.commands import print_trace
from ...traces.dataset.manifest import MANIFEST_NAME
from ...traces.dataset.store import Trace
from ...traces.dataset.writer import TraceWriter
from ...traces.errors import InputError
from ...traces.progress import shown_progress
from ...traces.published import read_published
from ...traces.stats import describe
from ..pattern.section import parse_layers, read_patterns
from .selector_options import SelectorOptions, with_selector_options

TokenizerName = StrEnum("TokenizerName", ["auto", "byte", "model"])
DtypeName = StrEnum("DtypeName", ["auto", "float32", "bfloat16", "float16"])


def capture(
    chosen: SelectorOptions,
    model: Annotated[Path, typer.Option(help="Model folder (config.json, safetensors), or a config.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace folder; one that exists is continued.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text file; may be repeated.")] = None,
    more_text: Annotated[list[Path] | None, typer.Argument(help="More text files.", show_default=False)] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Text windows; window i is training step i.")] = 1,
    settings: Annotated[Path | None, typer.Option(help="Published per-head settings (JSON), not --selector.")] = None,
    patterns: Annotated[Path | None, typer.Option(help="Patterns by layer (YAML), not --selector.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a mask block: 64 or 128.")] = 128,
    layers: Annotated[str, typer.Option(help="Layers to record: all, or a list such as 0,5,30-35.")] = "all",
    documents: Annotated[
        bool, typer.Option("--documents", help="Files are documents that do not see each other; positions restart.")
    ] = False,
    align: Annotated[
        bool, typer.Option("--align", help="With --documents: each begins with a block, padding fills the one before.")
    ] = False,
    sparse: Annotated[bool, typer.Option("--sparse", help="Continue with sparse attention by the pattern.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled rows and random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="auto: the model's on a GPU, float32 on a CPU.")] = DtypeName.auto,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Seeded weights: config only.")] = False,
    tokenizer: Annotated[TokenizerName, typer.Option(help="auto: the model's, else bytes.")] = TokenizerName.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Record what a model attends to on your text (needs torch).

    Works offline, on CPU and GPU. Windows that the trace already has are skipped, so an interrupted capture continues.
    """
    if block_size not in (64, 128):
        raise InputError(f"is {block_size}, must be 64 or 128", field="--block-size")
    if align and not documents:
        raise InputError("aligns documents: give --documents", field="--align")
    texts = [*(text or []), *(more_text or [])]
    if not texts:
        raise InputError("at least one text file is needed", field="--text")
    if (output / MANIFEST_NAME).exists():
        Trace.open(output)  # a trace that cannot be continued is refused before a model is loaded

    from ..audit.audit import audit
    from ..model.load import check_vocabulary, load_model, pick_device, read_config, read_windows
    from ..pattern.by_layer import selector_by_rules
    from ..pattern.selectors import published_selector
    from .capture import CaptureSettings, capture_model, trace_header

    file = _only_file(chosen, settings, patterns)
    section = None if patterns is None else read_patterns(patterns)
    selector = chosen.selector() if file is None else None
    audit(read_config(model)[1], seq_len_tokens=seq_len).require(source=model)
    windows = read_windows(
        texts, model_path=model, tokenizer=tokenizer, seq_len_tokens=seq_len, count=steps,
        align_tokens=block_size if align else 1,
    )  # fmt: skip
    loaded = load_model(model, random_weights=random_weights, device=pick_device(device), dtype=dtype, seed=seed)
    check_vocabulary(windows, loaded)
    model_id = model.name if model.is_dir() else model.parent.resolve().name or model.stem
    header = trace_header(
        loaded, model_id=f"{model_id} (random weights)" if random_weights else model_id, seq_len_tokens=seq_len,
        block_size=block_size, seed=seed, layers=parse_layers(layers, field="--layers"),
    )  # fmt: skip
    if settings is not None:
        shape = header.model
        selector = published_selector(read_published(settings, layers=shape.layers, heads=shape.heads))
    if section is not None:
        try:
            selector = selector_by_rules(section, layers=header.model.layers)
        except InputError as error:
            raise type(error)(str(error), source=patterns) from error
    assert selector is not None
    capture_settings = CaptureSettings(selector=selector, seed=seed, sparse=sparse)
    with TraceWriter(output, header) as writer, shown_progress() as progress:
        for step in range(writer.next_step, steps):
            apart = windows[step].documents if documents else None
            capture_model(
                loaded, windows[step].ids, writer, capture_settings, documents=apart, training_step=step,
                progress=progress,
            )  # fmt: skip
    written = Trace.open(output)
    if as_json:
        typer.echo(json.dumps(describe(written), indent=1))
    else:
        print_trace(written)


capture_verb = partial(with_selector_options, capture)  # with the options of all selectors that are registered then


def _only_file(chosen: SelectorOptions, settings: Path | None, patterns: Path | None) -> Path | None:
    """Return the file that says how patterns are chosen, if one does. InputError where something else does as well."""
    if settings is not None and patterns is not None:
        raise InputError("cannot be given beside --settings", field="--patterns")
    file, name = settings or patterns, "--settings" if patterns is None else "--patterns"
    for option in chosen.given if file is not None else ():
        raise InputError(f"comes from {file}, it cannot be given beside {name}", field=option)
    return file
