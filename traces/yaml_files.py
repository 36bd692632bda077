"""The one reader and writer of YAML: configurations and cluster files, by the core schema of YAML 1.2 and nothing more.

Only what a settings file needs is read: mappings with text as keys, lists, text, true and false, null, integers of 64
bits and finite numbers. `1.0e6` and `1e6` are numbers and a date is text. Anchors, aliases, keys that stand twice, deep
nesting and other tags are refused, so that no file of a few bytes can cost gigabytes or mean something unseen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from .errors import CONTROL, InputError, field_name, shortened, shown
from .files import read_bytes

MAX_DEPTH = 50
MAX_PROBLEM_CHARACTERS = 160
CORE = "tag:yaml.org,2002:"
INT64 = range(-(1 << 63), 1 << 63)

# YAML 1.2, section 10.3.2; digits may be grouped by underscores, which 1.1 allowed: such a number stays one.
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_FORMS = {
    "null": re.compile(r"(?:null|Null|NULL|~|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(rf"(?:[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        rf"(?:[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
_BASES = {"0o": 8, "0x": 16}


def read_yaml(path: Path, *, max_bytes: int) -> Any:
    """Return the one document of a YAML file as dict, list, str, bool, int, float or None (an empty file).

    Raises InputError, in one line that names the file and the field or the line, when the file is missing, larger than
    `max_bytes`, not UTF-8, not YAML, or says something that is not read here (see this module's first lines).
    """
    data = read_bytes(path, max_bytes=max_bytes)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 ({error.reason})", source=path, field=_line(data, error.start)) from error
    try:
        loader = _CoreLoader(text, path)
    except yaml.reader.ReaderError as error:
        problem = f"is not valid YAML (the character U+{error.character:04X} is not allowed)"
        raise InputError(problem, source=path, field=_line(text, error.position)) from error
    root = loader.whole()
    return None if root is None else loader.value_of(root, ())


def with_settings(document: Any, settings: Iterable[str], *, source: Path) -> Any:
    """Return a document that `read_yaml` gave with values set from the command line, each as `gpu.memory_bytes=80e9`.

    A value is read as YAML is; an empty one is null. Mappings that the document lacks are made. InputError, naming the
    setting, when it is not of this form or leads through something that is no mapping.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise InputError(f"{shown(setting)} is not of the form section.key=value", field="--set")
        loader = _CoreLoader(text, Path(f"--set {name}"))
        root = loader.whole()
        document = _with_value(document, keys, None if root is None else loader.value_of(root, ()), source)
    return document


def _with_value(document: Any, keys: Sequence[str], value: Any, source: Path) -> Any:
    if not keys:
        return value
    if document is not None and not isinstance(document, dict):
        raise InputError(f"{shown(document)} is no mapping that could hold {keys[0]!r}", source=source, field="--set")
    inner = (document or {}).get(keys[0])
    return (document or {}) | {keys[0]: _with_value(inner, keys[1:], value, source)}


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with the core schema's resolvers; refuses while it parses, before anything is built."""

    yaml_implicit_resolvers: ClassVar[Any] = {None: [(CORE + name, form) for name, form in _FORMS.items()]}

    def __init__(self, text: str, source: Path) -> None:
        self._source = source
        self._depth = 0
        super().__init__(text)

    def whole(self) -> yaml.Node | None:
        """Return the root of the file's one document, None when it is empty; InputError names the line."""
        try:
            return self.get_single_node()
        except InputError:
            raise
        except yaml.MarkedYAMLError as error:
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            line = (self if error.problem_mark is None else error.problem_mark).line
        except (OverflowError, ValueError):  # PyYAML's slips: escapes beyond Unicode, versions of thousands of digits
            problem, line = "an escape or a version is out of range", self.line
        problem = f"is not valid YAML ({shortened(problem, MAX_PROBLEM_CHARACTERS)})"
        raise InputError(problem, source=self._source, field=f"line {line + 1}")

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose as PyYAML does; InputError at an anchor, an alias, or more than MAX_DEPTH lists and mappings deep."""
        event: Any = self.peek_event()
        if event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise self._refusal(f"anchors and aliases are not read ({shown(sign + event.anchor)})", event)
        deeper = isinstance(event, yaml.CollectionStartEvent)
        self._depth += deeper
        if self._depth > MAX_DEPTH:
            raise self._refusal(f"is nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= deeper
        return node

    def value_of(self, node: yaml.Node, place: tuple[str, ...]) -> Any:
        """Return what a node says; place: the keys that lead to it. InputError names the place, the line, the value."""
        kind = node.tag.removeprefix(CORE)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value_of(item, (*place, str(number))) for number, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind == "str":
            return self._text(node, place)
        if not isinstance(node, yaml.ScalarNode) or kind not in _FORMS:
            raise self._refusal(f"the tag {shown(node.tag.replace(CORE, '!!'))} is not read here", node, place)
        if not _FORMS[kind].match(node.value):
            raise self._refusal(f"{shown(node.value)} is no !!{kind}", node, place)
        return self._scalar(kind, node, place)

    def _mapping(self, node: yaml.MappingNode, place: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag != CORE + "str" or not isinstance(key_node, yaml.ScalarNode):
                found = shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise self._refusal(f"a key must be text, not {found}", key_node, place)
            key, line = self._text(key_node, place), key_node.start_mark.line + 1
            if key in values:
                raise InputError(f"is given twice (in line {lines[key]}, again in line {line})", source=self._source,
                                 field=field_name((*place, key)))  # fmt: skip
            values[key] = self.value_of(value_node, (*place, key))
            lines[key] = line
        return values

    def _text(self, node: yaml.ScalarNode, place: tuple[str, ...]) -> str:
        if odd := CONTROL.search(node.value):
            raise self._refusal(f"{shown(node.value)} holds U+{ord(odd[0]):04X}, which is no text", node, place)
        return node.value

    def _scalar(self, kind: str, node: yaml.ScalarNode, place: tuple[str, ...]) -> bool | int | float | None:
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        if kind == "int":
            try:
                whole = int(node.value.replace("_", ""), _BASES.get(node.value[:2], 10))
            except ValueError:  # thousands of digits: Python's own limit
                whole = INT64.stop
            if whole not in INT64:
                raise self._refusal(f"{shown(node.value)} is no integer of 64 bits", node, place)
            return whole
        number = float(node.value.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(number):
            raise self._refusal(f"{shown(node.value)} is no finite number", node, place)
        return number

    def _refusal(self, problem: str, where: Any, place: tuple[str, ...] = ()) -> InputError:
        """where: a node or an event."""
        line = where.start_mark.line + 1
        if not place:
            return InputError(problem, source=self._source, field=f"line {line}")
        return InputError(f"{problem} (line {line})", source=self._source, field=field_name(place))


def _line(text: str | bytes, position: int) -> str:
    newline: Any = "\n" if isinstance(text, str) else b"\n"
    return f"line {text[:position].count(newline) + 1}"


def yaml_text(document: Any) -> str:
    """Return plain values as text that `read_yaml` reads: keys in their order, short lists in a line."""
    return yaml.safe_dump(document, sort_keys=False, width=118, default_flow_style=None)
