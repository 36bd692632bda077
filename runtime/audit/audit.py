"""One gate for every verb: is this model right when its sequence is split over ranks? By structure, and by numbers.

What the configuration says it does that planned attention does not is refused by name (`refusals.py`). Small copies of
the same class and settings (`small.py`) must then be a map of single tokens without attention (`single_tokens.py`), and
with it the same alone and split in two (`proof.py`): a model that nobody has heard of is right or refused, never
unknown. Audits are kept on disk by a digest of all they rest on (`cache.py`), and a model object is held to what
was audited (`instance.py`).
"""

from __future__ import annotations

import itertools
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...traces.errors import InputError, UnsupportedError
from ..comm.mesh import Mesh, agree
from ..model.shape import model_shape
from .cache import audit_digest, keep_audit, kept_audit, may_be_kept, model_digest, versions
from .instance import class_name, plain_class, refuse_strangers
from .mask_buffers import refuse_other_masks
from .proof import Errors, prove
from .refusals import refuse_by_configuration
from .result import Audit
from .single_tokens import check_single_tokens
from .small import AUDITED_TOKENS, SmallCopies

CACHE = Path("~/.cache/sparsering/audits")
DOES_NOT_RUN = "a small copy does not run"
_AUDITS = itertools.count()  # ranks audit in the same order


def audit(
    config: Any, *, seq_len_tokens: int, model_class: type[PreTrainedModel] | None = None, cache: Path | None = CACHE
) -> Audit:
    """Audit the model that a transformers configuration makes; model_class: the causal LM's, transformers' by default.

    seq_len_tokens: of the sequences that will be split; windows and original lengths are judged against it. Takes
    seconds on a CPU. cache: folder of earlier audits, None to do without. Raises InputError when the configuration
    makes no causal language model; every other outcome is in what returns.
    """
    chosen = model_class or causal_class(config)
    began = time.perf_counter()
    digest = audit_digest(config, chosen, seq_len_tokens)
    folder = cache if cache is not None and may_be_kept(chosen, config) else None
    if folder is not None and (known := kept_audit(folder, digest)) is not None:
        return known
    facts = Audit(
        model_type=config.model_type, model_class=chosen.__name__, seq_len_tokens=seq_len_tokens, digest=digest,
        model_sha256=model_digest(config, chosen, seq_len_tokens), right=False, versions=versions(),
    )  # fmt: skip
    try:
        with _plain_surroundings():
            found = _audited(facts, config, chosen, seq_len_tokens)
    except InputError as error:
        found = replace(facts, reason=str(error).removeprefix(f"{error.field}: "), about=error.field)
    except Exception as error:  # what cannot be audited is not proven, whatever the reason
        found = replace(facts, reason=f"cannot be audited ({_told(error)})", about="audit")
    found = replace(found, seconds=round(time.perf_counter() - began, 3))
    if folder is not None and DOES_NOT_RUN not in f"{found.reason}":  # which may have been this process's fault
        keep_audit(folder, found)
    return found


def require_model(
    model: PreTrainedModel, *, seq_len_tokens: int, mesh: Mesh | None = None, allow_hooks: bool = False
) -> Audit:
    """Audit a model's class and configuration, and raise UnsupportedError unless it is right.

    mesh: rank 0 audits and tells the others; collective. allow_hooks: where whole sequences run. Modules that the class
    does not make by itself are refused: nothing was proven about them (peft's adapters apart, which see one token at a
    time).
    """
    plain = plain_class(type(model))
    if mesh is None or mesh.world_size == 1:
        found = audit(model.config, seq_len_tokens=seq_len_tokens, model_class=plain)
    else:
        found = _audited_by_rank_0(mesh, model.config, plain, seq_len_tokens)
    found.require()
    refuse_strangers(model, plain, set(found.modules), allow_hooks=allow_hooks)
    if not allow_hooks:
        refuse_other_masks(model)
    return found


def _audited_by_rank_0(mesh: Mesh, config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> Audit:
    """Ranks must hold the same class, settings and versions: a digest of them is compared first."""
    topic = f"audit {next(_AUDITS)}"
    agree(mesh, f"{topic} model", audit_digest(config, model_class, seq_len_tokens))
    told = None
    try:
        if mesh.rank == 0:
            told = asdict(audit(config, seq_len_tokens=seq_len_tokens, model_class=model_class))
    finally:  # the others must not wait for a rank that failed
        told = mesh.broadcast(topic, told)
    if told is None:
        raise InputError("rank 0 could not audit the model; it says why", field="audit")
    return Audit(**told)


def causal_class(config: Any) -> type[PreTrainedModel]:
    """Return transformers' causal language model of a configuration; InputError when it has none."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    try:
        found = mapping[type(config)]
    except KeyError as error:
        raise InputError(
            f"{config.model_type!r} is no causal language model of transformers", field="model_type"
        ) from error
    return found[0] if isinstance(found, tuple | list) else found


def small_model(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> PreTrainedModel:
    """Return the small copy that the proof is about: float64, every kind of layer, lengths in proportion."""
    return SmallCopies(config, model_class).scaled(seq_len_tokens)


def _audited(facts: Audit, config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> Audit:
    refuse_by_configuration(config, seq_len_tokens=seq_len_tokens)
    facts = replace(facts, shape=model_shape(config).model_dump())
    copies = SmallCopies(config, model_class)
    _run(lambda: [check_single_tokens(one, seq_len_tokens=seq_len_tokens) for one in copies.at_true_lengths()])
    small = copies.scaled(seq_len_tokens)
    errors: dict[str, Errors] = _run(lambda: prove(small), scaled=True)
    return replace(
        facts,
        right=True,
        modules=sorted({class_name(type(module)) for module in small.modules()}),
        layers=model_shape(small.config).layers,
        parameters=small.num_parameters(),
        errors={road: {"loss": e.loss, "logits": e.logits, "gradient": e.gradient} for road, e in errors.items()},
    )


@contextmanager
def _plain_surroundings() -> Iterator[None]:
    """Audit as in a fresh process: with gradients, on the CPU, with one thread (small products; twins are two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def _run(check: Any, *, scaled: bool = False) -> Any:
    """Run a check; what a model's own code raises becomes the reason. scaled: lengths in messages are not a user's."""
    try:
        return check()
    except InputError as error:
        told = str(error).removeprefix(f"{error.field}: ")
        if not scaled or error.field == "audit" or "small copy" in told:
            raise
        told = f"{told} (seen in a small copy over {AUDITED_TOKENS} tokens)"  # a user would look the values up
        raise UnsupportedError(told, field=error.field) from error
    except Exception as error:  # the model's own code failed, alone or split: it is not proven, and that is the answer
        raise UnsupportedError(f"{DOES_NOT_RUN} ({_told(error)}; {_last_line(error)})", field="audit") from error


def _told(error: Exception) -> str:
    """Return what an error says in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _last_line(error: BaseException) -> str:
    """Return where the model's own code was: the last frame below transformers or the model's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name != "twins.py"]
    modelling = [frame for frame in frames if "modeling" in frame.filename] or frames
    return f"{Path(modelling[-1].filename).name}:{modelling[-1].lineno}" if modelling else "no line"
