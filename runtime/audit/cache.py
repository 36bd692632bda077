"""Audits on disk: by a digest of all they rest on, and only of classes that nobody changed in this process."""

from __future__ import annotations

import inspect
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...traces.errors import InputError
from ...traces.files import read_json, write_json
from .result import Audit

MAX_AUDIT_BYTES = 1 << 20
# What transformers' modelling files hold by themselves; another root means that somebody patched the module.
USUAL_ROOTS = frozenset(
    {"transformers", "torch", "numpy", "huggingface_hub", "kernels", "einops", "packaging", *sys.stdlib_module_names}
)


def may_be_kept(model_class: type, config: Any) -> bool:
    """Whether an audit holds in other processes: transformers' own class and configuration, with nothing patched.

    A class of a user's own depends on what its file imports, on closures and on the environment: it is audited anew.
    """
    homes = {type(config).__module__, *(base.__module__ for base in model_class.__mro__)}
    if any(home.partition(".")[0] not in USUAL_ROOTS for home in homes):
        return False
    module = sys.modules.get(model_class.__module__)
    return module is not None and not any(_is_foreign(value) for value in vars(module).values())


def _is_foreign(value: Any) -> bool:
    """Whether a name of a module, or a method of a class that it defines, comes from where none would."""
    home = getattr(value, "__module__", None)
    if isinstance(home, str) and home.partition(".")[0] not in USUAL_ROOTS:
        return True
    if not inspect.isclass(value) or not isinstance(home, str) or not home.startswith("transformers."):
        return False
    methods = (method for method in vars(value).values() if inspect.isfunction(method))
    return any((method.__module__ is not None and method.__module__.partition(".")[0] not in USUAL_ROOTS)
               or method.__globals__.get("__name__", "").startswith("__main__") for method in methods)  # fmt: skip


def kept_audit(folder: Path, digest: str) -> Audit | None:
    """Return the audit with this digest; None where there is none, or a file that is no audit."""
    path = _path(folder, digest)
    if path is None or not path.is_file():
        return None
    try:
        found = Audit(**read_json(path, max_bytes=MAX_AUDIT_BYTES))
    except (InputError, TypeError):
        return None
    return found if found.digest == digest else None


def keep_audit(folder: Path, found: Audit) -> None:
    """Write an audit; a home that cannot be written only costs the seconds again."""
    path = _path(folder, found.digest)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    except OSError:
        return


def _path(folder: Path, digest: str) -> Path | None:
    try:
        return folder.expanduser() / f"{digest}.json"
    except RuntimeError:  # no home
        return None
