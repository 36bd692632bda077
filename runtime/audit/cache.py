"""Audits on disk: by a digest of all they rest on, and only of classes that nobody changed in this process.

They rest on a model's class, settings and length, its sources, versions, and our own code.
"""

from __future__ import annotations

import inspect
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, masking_utils
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...traces.errors import InputError
from ...traces.files import canonical_json, read_json, sha256_of_bytes, sha256_of_file, write_json
from .instance import global_hooks
from .result import Audit

MAX_AUDIT_BYTES = 1 << 20
# What transformers' modelling files hold by themselves; another root means that somebody patched the module.
USUAL_ROOTS = frozenset(
    {"transformers", "torch", "numpy", "huggingface_hub", "kernels", "einops", "packaging", *sys.stdlib_module_names}
)
UNDIGESTED = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}


def model_digest(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str:
    """Return the SHA-256 of what was audited: class, settings, and the length that windows are judged against."""
    settings = {name: value for name, value in config.to_dict().items() if name not in UNDIGESTED}
    document = {
        "class": f"{model_class.__module__}.{model_class.__qualname__}",
        # As text, since canonical JSON has no infinity and some configurations do.
        "config": json.dumps(settings, default=str, sort_keys=True),
        "seq_len_tokens": seq_len_tokens,
    }
    return sha256_of_bytes(canonical_json(document))


def audit_digest(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str:
    """Return the SHA-256 of all that an audit rests on: the model, the source of its class, versions, our own code."""
    sources = set()
    for base in model_class.__mro__:
        with suppress(TypeError, OSError):  # a class without a file
            sources.add(Path(inspect.getsourcefile(base) or ""))
    here = Path(__file__).parent
    document = {
        "model": model_digest(config, model_class, seq_len_tokens),
        "source": "".join(sorted(_file_digest(path) for path in sources if path.is_file())),
        "versions": versions(),
        "audit": "".join(_file_digest(path) for path in sorted(_own_sources(here))),
    }
    return sha256_of_bytes(canonical_json(document))


def _own_sources(here: Path) -> list[Path]:
    """Return the files that decide what an audit says: its own, and what reads a model and its calls."""
    return [
        *here.glob("*.py"),
        *here.glob("../model/**/*.py"),
        *here.glob("../pattern/*.py"),
        *here.glob("../experts/*.py"),
    ]


def versions() -> dict[str, str]:
    """Return the versions that an audit rests on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}


@cache
def _file_digest(path: Path) -> str:
    return sha256_of_file(path)[:16]


def may_be_kept(model_class: type, config: Any) -> bool:
    """Whether an audit holds in other processes: transformers' own class and configuration, with nothing patched.

    A class of a user's own depends on what its file imports, on closures and on the environment: it is audited anew.
    """
    homes = [type(config).__module__, *(base.__module__ for base in model_class.__mro__)]
    module = sys.modules.get(model_class.__module__)
    if global_hooks() or any(map(_is_foreign, _registered())):
        return False
    return all(map(_is_usual, homes)) and module is not None and not any(map(_is_foreign, vars(module).values()))


def _registered() -> list[Any]:
    """Return what transformers' models look up by name, and the functions that make their masks."""
    known: list[Any] = [*LOSS_MAPPING.values(), *ROPE_INIT_FUNCTIONS.values(), *vars(masking_utils).values()]
    for activation in ACT2FN.values():
        known += activation if isinstance(activation, tuple) else [activation]
    return known


def _is_usual(home: object) -> bool:
    return not isinstance(home, str) or home.partition(".")[0] in USUAL_ROOTS


def _is_foreign(value: Any) -> bool:
    """Whether a name of a module, or a method of a class that it defines, comes from where none would."""
    home = getattr(value, "__module__", None)
    if not _is_usual(home):
        return True
    if not inspect.isclass(value) or not f"{home}".startswith("transformers."):
        return False
    methods = [method for method in vars(value).values() if inspect.isfunction(method)]
    return any(not _is_usual(method.__module__) or method.__globals__.get("__name__", "").startswith("__main__")
               for method in methods)  # fmt: skip


def kept_audit(folder: Path, digest: str) -> Audit | None:
    """Return the audit with this digest; None where there is none, or a file that is no audit."""
    try:
        found = Audit(**read_json(folder.expanduser() / f"{digest}.json", max_bytes=MAX_AUDIT_BYTES))
    except (InputError, TypeError, RuntimeError):  # RuntimeError: there is no home
        return None
    return found if found.digest == digest else None


def keep_audit(folder: Path, found: Audit) -> None:
    """Write an audit; a home that cannot be written only costs the seconds again."""
    with suppress(InputError, OSError, RuntimeError):
        write_json(folder.expanduser() / f"{found.digest}.json", asdict(found))
