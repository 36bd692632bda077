"""Options of a command that say how patterns are chosen: --selector, and one for every setting of every selector.

Selectors are made of torch's tensors. Without torch the command still has its help, with a word on what is not listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from enum import StrEnum
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...kernels.select import DEFAULT_SELECTOR
from ...traces.errors import InputError

if TYPE_CHECKING:
    from ...kernels.select.registry import Selector

UNLISTED = "How patterns are chosen. Its names, and options for their settings, are listed where torch is installed."


@dataclass(frozen=True, kw_only=True)
class SelectorOptions:
    """What the command line said. given: values of the settings' options, by option, where they were given.

    name: the selector's; None where the verb asks for none and none was given.
    """

    name: str | None
    given: Mapping[str, Any]

    def selector(self) -> Selector:
        """Return what was asked for. InputError for a setting that the selector has not, or cannot have."""
        from ...kernels.select.registry import option_of, selectors
        from ..pattern.selectors import make_selector

        if self.name is None:
            raise InputError("is missing, whose settings are given", field="--selector")
        settings = {one.name: option_of(one) for one in fields(selectors()[self.name])}  # some share an option
        for option in self.given:
            if option not in settings.values():
                raise InputError(f"{self.name} has no such setting", field=option)
        given = {name: self.given[option] for name, option in settings.items() if option in self.given}
        return make_selector(self.name, given)


def with_selector_options(verb: Callable[..., None], *, default: str | None = DEFAULT_SELECTOR) -> Callable[..., None]:
    """Return a function for typer like `verb`, whose `chosen: SelectorOptions` has become options of the command line.

    default: the selector where none is given; None: then there is none. Raises ValueError when a setting is spelt as
    another option of the verb.
    """
    settings: dict[str, dict[str, Field[Any]]] = {}  # option -> selector -> a setting of it that the option sets
    known = _registered()
    for selector, kind in known.items():
        for option, setting in _settings_by_option(kind).items():
            settings.setdefault(option, {})[selector] = setting
    options = {option.strip("-").replace("-", "_"): option for option in settings}

    def with_options(**arguments: Any) -> None:
        given = {option: arguments.pop(name) for name, option in options.items()}
        given = {option: value for option, value in given.items() if value is not None}
        name = arguments.pop("selector")
        chosen = SelectorOptions(name=None if name is None else str(name), given=given)
        verb(**arguments, chosen=chosen)

    own = [one for one in inspect.signature(verb, eval_str=True).parameters.values() if one.name != "chosen"]
    added = [
        _selector_parameter(known, default),
        *(_parameter(name, option, settings[option]) for name, option in options.items()),
    ]
    names = {one.name: one.annotation for one in (*own, *added)}
    if len(names) < len(own) + len(added):
        raise ValueError(f"settings of selectors are spelt as other options of {verb.__name__}: {options}")
    with_options.__name__, with_options.__doc__, with_options.__annotations__ = verb.__name__, verb.__doc__, names
    signature = inspect.Signature([one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*own, *added)])
    setattr(with_options, "__signature__", signature)  # noqa: B010 (not in a function's type)
    return with_options


def _registered() -> dict[str, type[Selector]]:
    """Return all selectors by name; none without torch."""
    try:
        from ...kernels.select.registry import selectors
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        return {}
    return selectors()


def _settings_by_option(kind: type[Selector]) -> dict[str, Field[Any]]:
    from ...kernels.select.registry import option_of

    return {option_of(setting): setting for setting in fields(kind)}


def _selector_parameter(known: Mapping[str, type[Selector]], default: str | None) -> Parameter:
    if not known:
        unlisted = Annotated[str if default else str | None, typer.Option("--selector", help=UNLISTED)]
        return Parameter("selector", Parameter.KEYWORD_ONLY, default=default, annotation=unlisted)
    told = "; ".join(f"{name}: {kind.help}{'' if kind.causal else ' (looks ahead)'}" for name, kind in known.items())
    names: Any = StrEnum("SelectorName", {name.replace("-", "_"): name for name in known})
    option = typer.Option(
        "--selector", help=f"How patterns are chosen{'' if default else ', where not densely'}. {told}."
    )
    kind = Annotated[names if default else names | None, option]
    value = None if default is None else names(default)
    return Parameter("selector", Parameter.KEYWORD_ONLY, default=value, annotation=kind)


def _parameter(name: str, option: str, settings: Mapping[str, Field[Any]]) -> Parameter:
    selectors_by_text: dict[str, list[str]] = {}
    for selector, setting in settings.items():
        selectors_by_text.setdefault(setting.metadata["about"], []).append(selector)
    told = "; ".join(f"{', '.join(names)}: {text}" for text, names in selectors_by_text.items())
    number: Any = type(next(iter(settings.values())).default)
    kind = Annotated[number | None, typer.Option(option, help=f"{told}.")]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
