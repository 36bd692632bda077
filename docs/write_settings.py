"""Writes the keys of a training configuration into docs/settings.md, from the model that checks them. `make docs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsering.runtime.train.config import TrainConfig

PAGE = Path(__file__).resolve().parent / "settings.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"
KINDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    dict: "mapping",
    BaseModel: "mapping",
}


def alternatives(annotation: Any) -> list[Any]:
    """Return the types that a value may have, `None` left out."""
    union = get_origin(annotation) is Union or type(annotation).__name__ == "UnionType"
    return [one for one in (get_args(annotation) if union else (annotation,)) if one is not NoneType]


def kind_of(annotation: Any) -> str:
    """Return what a value must be, in words."""
    words = []
    for one in alternatives(annotation):
        origin = get_origin(one) or one
        if hasattr(one, "__metadata__"):
            words.append(kind_of(one.__origin__))
        elif origin is Literal:
            words.append(", ".join(f"`{value}`" for value in get_args(one)))
        elif origin is tuple:
            items = get_args(one)
            of_items = kind_of(items[0]) if items[-1] is Ellipsis else f"{len(items)} numbers"
            words.append(f"list of {of_items}")
        else:
            words.append(KINDS[next(known for known in KINDS if issubclass(origin, known))])
    return " or ".join(dict.fromkeys(words))


def limits(field: FieldInfo) -> str:
    """Return the bounds of a number, as " ≥ 1"."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    named = [(sign, getattr(one, name, None)) for one in field.metadata for name, sign in signs.items()]
    found = [f"{sign} {limit:,}" for sign, limit in named if limit is not None]
    return ", " + ", ".join(found) if found else ""


def default_of(field: FieldInfo) -> str:
    """Return a field's default, in YAML's words."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key opens, if it does."""
    found = [one for one in alternatives(annotation) if inspect.isclass(one) and issubclass(one, BaseModel)]
    return found[0] if found else None


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of one section that hold values."""
    for name, field in model.model_fields.items():
        if section_of(field.annotation) is None:
            yield f"| `{prefix}{name}` | {kind_of(field.annotation)}{limits(field)} | {default_of(field)} |"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], bool]]:
    """Yield (name, section, whether it may be left out and then does nothing), each before those within it."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield f"{prefix}{name}", section, not field.is_required() and field.default is None
            yield from sections(section, f"{prefix}{name}.")


def said(section: type[BaseModel]) -> str:
    """Return a section's docstring, its keys as code."""
    names = "|".join(section.model_fields)
    return re.sub(rf"(?<![\w`])({names}):", r"`\1`:", inspect.getdoc(section) or "")


def rendered() -> str:
    """Return what belongs between the marks of the page."""
    head = ["| key | value | default |", "|---|---|---|"]
    lines = ["", "### Of the whole run", "", *head, *rows(TrainConfig), ""]
    for name, section, optional in sections(TrainConfig):
        without = ["", "Without this section nothing of it is done."] if optional else []
        lines += [f"### `{name}`", "", said(section), *without, "", *head, *rows(section, f"{name}."), ""]
    return "\n".join([*lines, ""])


def main() -> None:
    """Replace what stands between the marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{rendered()}{END}{after}")


if __name__ == "__main__":
    main()
