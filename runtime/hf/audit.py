"""One gate for every verb: is this model right when its sequence is split over ranks? By structure, and by numbers.

What the configuration says it does that planned attention does not is refused by name (`refusals.py`). Then a small
copy of the same class and settings is run alone and split in two (`shrink.py`, `proof.py`): a model that nobody has
heard of is right or refused, never unknown. Passed and failed audits are kept on disk, by a digest of all they rest on.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...planner.plan import ModelShape
from ...traces.errors import InputError, UnsupportedError
from ...traces.files import canonical_json, read_json, sha256_of_bytes, write_json
from ..mesh import Mesh, agree
from .proof import AUDITED_TOKENS, PADDED_TOKENS, Proof, prove
from .refusals import refuse_by_configuration
from .shape import model_shape
from .shrink import Shrinking, enliven, layer_count, layers_to_keep, plan_shrinking, shrunken_config
from .twins import Double

CACHE = Path("~/.cache/sparsering/audits")
MOST_PARAMETERS = 60_000_000  # of the small copy: float64, three copies and their gradients stay within 4 GB
MAX_AUDIT_BYTES = 1 << 20
_AUDITS = itertools.count()  # ranks audit in the same order
# peft's adapters see one token at a time, torch.compile wraps what was there, dropout is refused by its rate.
HARMLESS_MODULES = ("peft.tuners.", "torch._dynamo.", "torch.nn.modules.container.", "torch.nn.modules.dropout.",
                    "torch.nn.modules.linear.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the audit of a model said. Only `right` counts; the rest says why.

    reason: one line, None when right; about: the setting, parameter or module that it is about
    shape: attention's, as the configuration states it and the small copy showed it
    errors: largest relative errors by road ("attach", "train") and kind ("loss", "logits", "gradient")
    modules: the classes that the small copy is made of; layers: how many it had
    digest: of all that it rests on, versions and sources too; model_sha256: of class, settings and length alone
    """

    model_type: str
    model_class: str
    seq_len_tokens: int
    digest: str
    model_sha256: str
    right: bool
    reason: str | None = None
    about: str | None = None
    shape: dict[str, int] | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    layers: int | None = None
    parameters: int | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def require(self, *, source: str | Path | None = None) -> None:
        """Raise UnsupportedError with the reason unless the model is right."""
        if not self.right:
            raise UnsupportedError(f"{self.reason}", source=source or self.model_class, field=self.about)


def audit(
    config: Any, *, seq_len_tokens: int, model_class: type[PreTrainedModel] | None = None, cache: Path | None = CACHE
) -> Audit:
    """Audit the model that a transformers configuration makes; model_class: the causal LM's, transformers' by default.

    seq_len_tokens: of the sequences that will be split; windows and original lengths are judged against it. Takes
    seconds on a CPU. cache: folder of earlier audits, None to do without. Raises InputError when the configuration
    makes no causal language model; every other outcome is in what returns.
    """
    chosen = model_class or causal_class(config)
    digest = audit_digest(config, chosen, seq_len_tokens)
    known = _kept(cache, digest)
    if known is not None:
        return known
    began = time.perf_counter()
    facts = Audit(
        model_type=config.model_type, model_class=chosen.__name__, seq_len_tokens=seq_len_tokens, digest=digest,
        model_sha256=model_digest(config, chosen, seq_len_tokens),
        right=False, versions=_versions(),
    )  # fmt: skip
    try:
        found = _audited(facts, config, chosen, seq_len_tokens)
    except InputError as error:
        text = str(error).partition(": ")[2] if error.field is not None else str(error)
        found = replace(facts, reason=text, about=error.field)
    found = replace(found, seconds=round(time.perf_counter() - began, 3))
    _keep(cache, found)
    return found


def require_model(model: PreTrainedModel, *, seq_len_tokens: int, mesh: Mesh | None = None) -> Audit:
    """Audit a model's class and configuration, and raise UnsupportedError unless it is right.

    mesh: rank 0 audits and tells the others; collective. Modules that the class does not make by itself are refused:
    nothing was proven about them (peft's adapters apart, which see one token at a time).
    """
    plain = _plain_class(type(model))
    if mesh is None or mesh.world_size == 1:
        found = audit(model.config, seq_len_tokens=seq_len_tokens, model_class=plain)
    else:
        found = _audited_by_rank_0(mesh, model.config, plain, seq_len_tokens)
    found.require()
    _refuse_strangers(model, found)
    return found


def _audited_by_rank_0(mesh: Mesh, config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> Audit:
    """Ranks must hold the same class, settings and versions: a digest of them is compared first."""
    topic = f"audit {next(_AUDITS)}"
    agree(mesh, f"{topic} model", audit_digest(config, model_class, seq_len_tokens))
    told = None
    if mesh.rank == 0:
        try:
            told = asdict(audit(config, seq_len_tokens=seq_len_tokens, model_class=model_class))
        finally:  # the others must not wait for a rank that failed
            mesh.broadcast(topic, told)
    told = told or mesh.broadcast(topic, None)
    if told is None:
        raise InputError("rank 0 could not audit the model; it says why", field="audit")
    return Audit(**told)


def _refuse_strangers(model: PreTrainedModel, found: Audit) -> None:
    """Refuse modules that the audited class does not make by itself: nothing was proven about them."""
    known = set(found.modules)
    for name, module in model.named_modules():
        classes = [_class_name(base) for base in type(module).__mro__]
        if not known.intersection(classes) and not classes[0].startswith(HARMLESS_MODULES):
            raise UnsupportedError(f"is a {classes[0]}, which {found.model_class} does not have by itself: the audit "
                                   "proves nothing about it", source=found.model_class, field=name)  # fmt: skip


def _class_name(one: type) -> str:
    return f"{one.__module__}.{one.__qualname__}"


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


def model_digest(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str:
    """Return the SHA-256 of what was audited: class, settings, and the length that windows are judged against."""
    name = f"{model_class.__module__}.{model_class.__qualname__}"
    document = {"class": name, "config": _plain_settings(config), "seq_len_tokens": seq_len_tokens}
    return sha256_of_bytes(canonical_json(document))


def audit_digest(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str:
    """Return the SHA-256 of all that an audit rests on: the model, the source of its class, versions, our own code."""
    document = {
        "model": model_digest(config, model_class, seq_len_tokens),
        "source": _source_digest(model_class),
        "versions": _versions(),
        "audit": _own_digest(),
    }
    return sha256_of_bytes(canonical_json(document))


def _audited(facts: Audit, config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> Audit:
    refuse_by_configuration(config, seq_len_tokens=seq_len_tokens)
    shape: ModelShape = model_shape(config)
    facts = replace(facts, shape=shape.model_dump())
    small = small_model(config, model_class, seq_len_tokens)
    proof = _proven(small)
    return replace(
        facts,
        right=True,
        modules=sorted({_class_name(type(module)) for module in small.modules()}),
        layers=layer_count(small.config),
        parameters=proof.parameters,
        errors={road: {"loss": e.loss, "logits": e.logits, "gradient": e.gradient} for road, e in proof.errors.items()},
    )


def small_model(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> PreTrainedModel:
    """Make the small copy: narrow with all layers first, to see their kinds, then with enough of them."""
    shrinking = plan_shrinking(
        config, seq_len_tokens=seq_len_tokens, audited_tokens=AUDITED_TOKENS, padded_tokens=PADDED_TOKENS
    )
    problem: Exception | None = None
    for candidate in (shrinking, replace(shrinking, few=False), replace(shrinking, few=False, width=1)):
        try:
            with torch.device("meta"):
                whole = _make(shrunken_config(config, candidate), model_class)
            keep = layers_to_keep(whole)
            fewer = _fewer_layers(config, candidate, keep, model_class)
        except UnsupportedError:
            raise
        except Exception as error:  # whatever a class says about narrow settings, wider ones are tried
            problem = problem or error
            continue
        with Double(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _make(fewer, model_class).double()
        enliven(model, seed=0)
        return model
    raise UnsupportedError(
        f"no small copy can be made ({type(problem).__name__}: {problem})", field="audit"
    ) from problem


def _fewer_layers(config: Any, shrinking: Shrinking, keep: int | None, model_class: type[PreTrainedModel]) -> Any:
    """Return the smallest configuration that can be made and is small enough to run."""
    tried: list[Shrinking] = [shrinking] if keep is None else [replace(shrinking, layers=keep), shrinking]
    problem: Exception | None = None
    for candidate in tried:
        try:
            small = shrunken_config(config, candidate)
            small.use_cache = False
            with torch.device("meta"):
                parameters = sum(p.numel() for p in _make(small, model_class).parameters())
        except Exception as error:  # a class may not know how to have fewer layers
            problem = error
            continue
        if parameters <= MOST_PARAMETERS:
            return small
        problem = MemoryError(f"{parameters:,} parameters are too many")
    assert problem is not None
    raise problem


def _make(config: Any, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    return model_class._from_config(config, attn_implementation="eager")


def _proven(small: PreTrainedModel) -> Proof:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return prove(small)
    except InputError as error:
        raise _in_the_small_copy(error) from error
    except Exception as error:  # the model's own code failed, alone or split: it is not proven, and that is the answer
        where = _last_line(error)
        raise UnsupportedError(
            f"a small copy does not run ({type(error).__name__}: {error}; {where})", field="audit"
        ) from error


def _in_the_small_copy(error: InputError) -> InputError:
    """Say that values in a refusal are those of a small copy, where they are a user's to look up."""
    told = str(error).removeprefix(f"{error.field}: ")
    if error.field == "audit" or "small copy" in told:
        return error
    return UnsupportedError(f"{told} (seen in a small copy over {AUDITED_TOKENS} tokens)", field=error.field)


def _last_line(error: BaseException) -> str:
    """Return where the model's own code was: the last frame below transformers or the model's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name != "twins.py"]
    modelling = [frame for frame in frames if "modeling" in frame.filename] or frames
    return f"{Path(modelling[-1].filename).name}:{modelling[-1].lineno}" if modelling else "no line"


def _plain_class(model_class: type) -> type[PreTrainedModel]:
    """Return the class that FSDP, which puts itself in front, was given."""
    for base in model_class.__mro__:
        if issubclass(base, PreTrainedModel) and not base.__module__.startswith("torch."):
            return base
    raise UnsupportedError(f"{model_class.__name__} is no transformers model", field="model")


def _plain_settings(config: Any) -> Any:
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}
    # As text, since canonical JSON has no infinity and some configurations do.
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in ignored}, default=str, sort_keys=True)


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}


def _source_digest(model_class: type) -> str:
    """Of the files that define a class and its parents; a class without a file is told apart by its code alone."""
    files = set()
    for base in model_class.__mro__:
        try:
            files.add(inspect.getsourcefile(base))
        except TypeError:
            continue
    return "".join(sorted(_file_digest(name) for name in files if name and not name.startswith("<")))


@lru_cache(maxsize=4096)
def _file_digest(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _own_digest() -> str:
    folder = Path(__file__).parent
    return "".join(_file_digest(str(path)) for path in sorted([*folder.glob("*.py"), folder.parent / "losses.py"]))


def _kept(cache: Path | None, digest: str) -> Audit | None:
    path = None if cache is None else cache.expanduser() / f"{digest}.json"
    if path is None or not path.is_file():
        return None
    try:
        found = Audit(**read_json(path, max_bytes=MAX_AUDIT_BYTES))
    except (InputError, TypeError):
        return None  # a file that is no audit is made again
    return found if found.digest == digest else None


def _keep(cache: Path | None, found: Audit) -> None:
    if cache is None:
        return
    try:
        cache.expanduser().mkdir(parents=True, exist_ok=True)
        write_json(cache.expanduser() / f"{found.digest}.json", asdict(found))
    except OSError:
        return  # a home that cannot be written only costs the seconds again
