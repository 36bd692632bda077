"""What a model hands transformers for its masks: functions of two positions, put together of others.

A shard's positions are not those that such a function would be asked for, so it is never called; where its parts come
from says whether they are what the audit has seen. A model of a user's own may mask with a function of its own, beyond
the tokens that an audit looks at.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from ....traces.errors import UnsupportedError

HOME = "transformers."
WINDOW = "sliding_window"


def refuse_own_functions(function: Any, config: Any) -> None:
    """Raise UnsupportedError for a mask function with a part that is not transformers', or a window not in `config`."""
    for part in () if function is None else _parts(function):
        home = f"{getattr(part, '__module__', None)}."
        name = getattr(part, "__qualname__", type(part).__qualname__)
        if not home.startswith(HOME):
            told = f"{home}{name} masks attention: the audit proves nothing about it"
            raise UnsupportedError(told, field="mask_function")
        given = inspect.getclosurevars(part).nonlocals if inspect.isfunction(part) else {}
        window = given.get(WINDOW)
        if type(window) is int and window != getattr(config, WINDOW, window):
            told = f"has a window of {window} tokens, the configuration one of {getattr(config, WINDOW)}"
            raise UnsupportedError(told, field="mask_function")


def _parts(function: Any) -> Iterator[Any]:
    """Yield a function, and those that it was put together of."""
    while isinstance(function, functools.partial):
        function = function.func
    yield function
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for one in held if isinstance(held, tuple | list) else (held,):
            if inspect.isfunction(one) or isinstance(one, functools.partial):
                yield from _parts(one)
