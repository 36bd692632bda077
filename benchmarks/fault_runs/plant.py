"""Plants one fault in one process of a run, from outside: a real function is wrapped, and the product is not changed.

`site/sitecustomize.py` calls `install` in processes that begin as programs; `forked.py` in those that are forked. What
is planted stands in the environment variable FAULT, as JSON: a list of `Planted`'s fields. Standard library alone, so
that nothing is imported before the process under test would.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import abc, machinery, util
from pathlib import Path
from typing import Any

FAULT = "SPARSERING_FAULT"
LAUNCHER = -1
STEP = "sparsering.runtime.train.loop:Trainer.step"
FOR_EVER_S = 600.0
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One thing that happens in one process.

    rank: in which, LAUNCHER for the process that starts the ranks. target: before which function's call, as
    "module:qualified.name"; "" as soon as the process begins. steps: not before so many training steps were begun,
    calls: and so many calls passed after that. action: one of ACTIONS; value: what it takes. sign: this file is written
    first; awaited: this file must be there. attempt: of a launcher that starts ranks again.
    """

    rank: int
    target: str
    action: str
    value: Any = None
    steps: int = 0
    calls: int = 0
    sign: str = ""
    awaited: str = ""
    attempt: int = 0


def install() -> None:
    """Plant what the environment says, if it is for this process."""
    rank = int(os.environ.get("RANK", LAUNCHER))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    for fields in json.loads(os.environ.get(FAULT, "[]")):
        planted = Planted(**fields)
        if (planted.rank, planted.attempt) == (rank, attempt):
            if planted.target:
                _Strike(planted).arm()
            else:
                _strike(planted)


class _Strike:
    """Waits for the call."""

    def __init__(self, planted: Planted) -> None:
        self._planted, self._steps, self._calls, self._done = planted, 0, 0, False

    def arm(self) -> None:
        if self._planted.steps:
            wrap(STEP, self._begin_step)
        wrap(self._planted.target, self._call)

    def _begin_step(self) -> None:
        self._steps += 1

    def _call(self) -> Callable[[Any], Any] | None:
        planted = self._planted
        if self._done or self._steps < planted.steps or (planted.awaited and not Path(planted.awaited).exists()):
            return None
        self._calls += 1
        if self._calls <= planted.calls:
            return None
        self._done = True
        return _strike(planted)


def _strike(planted: Planted) -> Callable[[Any], Any] | None:
    if planted.sign:
        partial = Path(f"{planted.sign}.new")
        partial.write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
        partial.rename(planted.sign)
    return ACTIONS[planted.action](planted.value)


def _signal(name: Any) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    time.sleep(POLL_S)  # the signal may be delivered to another thread, a moment later


def _raise(value: Any) -> None:
    import builtins

    kind, told = value
    raise getattr(builtins, kind)(told)


def _hold(value: Any) -> None:
    """Stay here until somebody ends the process."""
    began = time.monotonic()
    while time.monotonic() - began < FOR_EVER_S:
        time.sleep(POLL_S)


def _limit(value: Any) -> None:
    """From now on no file of this process may become larger: it stands for a full disk of this rank alone.

    The signal that comes with it is one that Python ignores."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (value, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _versions(folder: Any) -> None:
    """Let this process find other packages' metadata first."""
    sys.path.insert(0, folder)


def _other_file(path: Any) -> Callable[[Any], Any]:
    """Have the call read another file than it was given."""
    return lambda arguments: (Path(path), *arguments[1:])


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "signal": _signal, "raise": _raise, "hold": _hold, "sleep": time.sleep, "limit": _limit, "versions": _versions,
    "other file": _other_file, "note": lambda value: None, "exit": os._exit,
}  # fmt: skip


# Wrapping a function that may not be there yet ------------------------------------------------------------------------


def wrap(target: str, before: Callable[[], Callable[[Any], Any] | None]) -> None:
    """Have `before` called before every call of a function, now or once its module is imported.

    Where `before` returns a function, the call gets the positional arguments that it makes of its own.
    """
    module, _, name = target.partition(":")
    if module in sys.modules:
        _replace(sys.modules[module], name, before)
    else:
        sys.meta_path.insert(0, _Finder(module, name, before))


def _replace(module: Any, name: str, before: Callable[[], Callable[[Any], Any] | None]) -> None:
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, module)
    original = getattr(owner, last)

    @functools.wraps(original)
    def planted(*arguments: Any, **named: Any) -> Any:
        change = before()
        return original(*(change(arguments) if change else arguments), **named)

    setattr(owner, last, planted)
    if owners:
        return
    for other in list(sys.modules.values()):  # who imported the function by its name before
        known = getattr(other, "__dict__", {})
        for alias in [alias for alias, value in list(known.items()) if value is original]:
            known[alias] = planted


class _Finder(abc.MetaPathFinder):
    """Finds one module as everybody else does, and replaces a function of it as soon as it has run."""

    def __init__(self, module: str, name: str, before: Callable[[], Callable[[Any], Any] | None]) -> None:
        self._module, self._name, self._before = module, name, before

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> machinery.ModuleSpec | None:
        """Return how the one module is loaded, its function replaced afterwards; None for all others."""
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run, name, before = spec.loader.exec_module, self._name, self._before

            def exec_module(module: Any) -> None:
                run(module)
                _replace(module, name, before)

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec
