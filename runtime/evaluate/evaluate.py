"""`evaluate`: a loaded model on held-out data, dense or with a selector; what the verb `sparsering eval` calls."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.select.registry import Selector
from ...planner.schedule.backends import computed_head_dim
from ...traces.dataset.manifest import library_versions
from ...traces.errors import InputError
from ...traces.progress import Progress, no_progress
from ..audit.audit import require_model
from ..data.shards import TokenData
from ..data.writer import Tokenizer
from ..hf.capture import in_eval_mode, sparse_backend
from ..model.losses import IGNORED_LABEL
from ..model.shape import check_angles, model_shape, setting, text_config
from ..pattern.by_layer import LayerSelectors
from .buckets import Places
from .checks import require_fit
from .head import Head
from .heldout import Text, drawn, text_of
from .measures import MaskMeasures
from .result import Arm, Cell, Evaluation, Quantity, Reading
from .retrieval import ask
from .runner import Runner
from .settings import AGREEMENT, LOSS, NEEDLE, OF_TEXT, REACH, EvaluationSettings

Key = tuple[Quantity, Arm]


def evaluate(
    model: PreTrainedModel, data: TokenData, selector: Selector | None, settings: EvaluationSettings, *,
    name: str | None = None, tokenizer: Tokenizer | None = None, progress: Progress = no_progress,
) -> Evaluation:  # fmt: skip
    """Evaluate a model as it stands, on its own device, one sequence at a time, without gradients.

    model: a transformers causal LM, not attached; runs in eval mode and is left as it was. selector: chooses the
    patterns of the layers that the model does not limit itself; None: dense attention. name: the arm's, in the result;
    by default the selector's, or "dense". tokenizer: of the data's token ids, needed to plant something; bytes need
    none to be given.
    Raises InputError for settings that do not fit model, data or each other, UnsupportedError with the reason when the
    model does not pass the audit, or its heads do not fit the kernels.
    """
    tokenizer = require_fit(model.config, data, selector, settings, tokenizer)
    _require_model(model, selector, settings)
    runner = Runner(
        model=model, selector=selector, block_size=settings.block_size, dense=settings.dense_too, head=Head(model)
    )
    readings: tuple[Reading, ...] = ()
    cells: tuple[Cell, ...] = ()
    wants_reach = REACH in settings.tasks
    measures = MaskMeasures(
        far_tokens=settings.far_tokens if wants_reach else (), weighed=wants_reach, seed=settings.seed
    )
    with in_eval_mode(model):
        if any(task in OF_TEXT for task in settings.tasks):
            readings = _read(runner, data, settings, measures, progress)
        if settings.asks_questions:
            assert tokenizer is not None
            cells = ask(runner.best, runner.arms, data, tokenizer, settings, progress)
    told: dict[Arm, float] = {one.arm: one.mean for one in readings if one.quantity == "loss"}
    own: Arm = "dense" if selector is None else "sparse"
    return Evaluation(
        arm=name or ("dense" if selector is None else selector.name),
        selector=None if selector is None else selector.name, selector_settings=_settings_of(selector),
        seq_len=settings.seq_len_tokens, seed=settings.seed, total_density=measures.total_density(),
        heldout_loss=told.get(own), heldout_loss_dense=told.get("dense"),
        needle_last=_share(cells, own, "last", settings), needle_mid=_share(cells, own, "mid", settings),
        model=_model_facts(model), data=_data_facts(data), settings=_plain(asdict(settings)),
        attention={arm: tuple(sorted(names)) for arm, names in runner.ran.items()},
        versions=library_versions("sparsering", "torch", "transformers"),
        readings=readings, cells=cells, reach=measures.rows() if wants_reach else (),
    )  # fmt: skip


def _require_model(model: PreTrainedModel, selector: Selector | None, settings: EvaluationSettings) -> None:
    """Refuse a model that does not pass the audit at every length it is called with, or whose heads do not fit."""
    check_angles(model)
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    if selector is not None:
        computed_head_dim(
            sparse_backend(model.device), head_dim=model_shape(model.config).head_dim,
            dtype=str(dtype).removeprefix("torch."), block_size=settings.block_size,
        )  # fmt: skip
    for length in settings.all_lengths():
        require_model(model, seq_len_tokens=length, allow_hooks=True)


def _read(
    runner: Runner, data: TokenData, settings: EvaluationSettings, measures: MaskMeasures, progress: Progress
) -> tuple[Reading, ...]:
    """Return what held-out text shows: losses, agreement; masks on the way."""
    found: dict[Key, list[Tensor]] = {}
    texts: list[Text] = []
    sequences = drawn(data, count=settings.sequences, seq_len_tokens=settings.seq_len_tokens, seed=settings.seed)
    for number, sequence in enumerate(sequences):
        text = text_of(sequence, settings.documents)
        for key, values in _values(runner, text, settings, measures):
            found.setdefault(key, []).append(values)
        texts.append(text)
        progress("reading held-out text", number + 1, len(sequences))
    valid = torch.stack([text.labels != IGNORED_LABEL for text in texts])
    if not bool(valid.any()):
        raise InputError("leave nothing to predict", source=data.folder, field="documents")
    places = Places(valid=valid, seen=torch.stack([text.seen for text in texts]))
    whole = {key: torch.stack(values) for key, values in found.items()}
    return tuple(places.reading(*key, values) for key, values in (whole | _differences(whole)).items())


def _values(
    runner: Runner, text: Text, settings: EvaluationSettings, measures: MaskMeasures
) -> list[tuple[Key, Tensor]]:
    """Return values [S] of one sequence by (quantity, arm)."""
    cut = settings.cut_context_tokens
    values: list[tuple[Key, Tensor]] = []
    hidden: dict[Arm, Tensor] = {}
    for arm in runner.arms:
        hidden[arm] = runner.hidden(arm, text, measures.watch if arm == "sparse" else None)
        if LOSS in settings.tasks:
            values.append((("loss", arm), runner.head.losses(hidden[arm], text.labels)))
            if 0 < cut < settings.seq_len_tokens:
                values.append((("cut_loss", arm), runner.cut_losses(arm, text, cut)))
    if AGREEMENT in settings.tasks:
        apart, same = runner.head.divergence(hidden["dense"], hidden["sparse"])
        values.append((("kl", "sparse"), apart))
        values.append((("top_1", "sparse"), same))
    return values


def _differences(whole: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Return differences of losses of the same tokens."""
    found: dict[Key, Tensor] = {}
    for (quantity, arm), values in whole.items():
        if quantity == "cut_loss":
            found["cut_minus_whole", arm] = values - whole["loss", arm]
    if ("loss", "dense") in whole and ("loss", "sparse") in whole:
        found["loss_minus_dense", "sparse"] = whole["loss", "sparse"] - whole["loss", "dense"]
    return found


def _share(cells: tuple[Cell, ...], arm: Arm, question: str, settings: EvaluationSettings) -> float | None:
    """Return the share of needles found in the longest sequences with the most needles, over all depths."""
    if NEEDLE not in settings.tasks:
        return None
    wanted = ("needle", arm, question, max(settings.needles), max(settings.planted_lengths))
    own = [one for one in cells if (one.task, one.arm, one.question, one.planted, one.length_tokens) == wanted]
    return sum(one.found for one in own) / sum(one.asked for one in own)


def _settings_of(selector: Selector | None) -> dict[str, Any]:
    """Return a selector's settings; of one that differs from layer to layer, each layer's name and settings."""
    if isinstance(selector, LayerSelectors):
        return {"layers": [{"selector": one.name, "settings": one.settings} for one in selector.layers]}
    return {} if selector is None else dict(selector.settings)


def _model_facts(model: PreTrainedModel) -> dict[str, Any]:
    text = text_config(model.config)
    return {
        "model_type": text.model_type, "shape": model_shape(model.config).model_dump(),
        "parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "max_position_embeddings": setting(text, "max_position_embeddings"),
        "rope_parameters": _plain(setting(text, "rope_parameters")),
    }  # fmt: skip


def _data_facts(data: TokenData) -> dict[str, Any]:
    facts = data.manifest
    return {"folder": str(data.folder), "digest": facts.digest, "tokenizer": facts.tokenizer, "tokens": data.tokens}


def _plain(value: Any) -> Any:
    """Return values as JSON has them: tuples become lists."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
