"""Published per-head settings: the real format is read, anything else is refused with file, layer and head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsering.traces.errors import InputError
from sparsering.traces.published import FixedBudget, FlexBudget, read_published

FIXED = ["vertical_and_slash", 1000, 6096, 0.98]
FLEX = ["flex_vertical_and_slash", [0.9, 4096], [0.95, 2048], 0.0]


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def grid(layers: int = 2, heads: int = 3) -> list[dict[str, Any]]:
    return [{str(head): FIXED for head in range(heads)} for _ in range(layers)]


def test_both_kinds_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "s.json", [{"1": FLEX, "0": FIXED}, {"0": FLEX, "1": FLEX}])
    settings = read_published(path, layers=2, heads=2)
    assert settings[0][0] == FixedBudget(columns=1000, slashes=6096, score=0.98)
    assert settings[0][1] == FlexBudget(
        columns_mass=0.9, columns_cap=4096, slashes_mass=0.95, slashes_cap=2048, score=0.0
    )
    assert settings[0][1] == settings[1][0] == settings[1][1]


def test_more_than_ten_heads_keep_their_numbers(tmp_path: Path) -> None:
    layer = {str(head): ["vertical_and_slash", head + 1, 9, 0.0] for head in reversed(range(12))}
    (heads,) = read_published(written(tmp_path / "s.json", [layer]))
    assert [head.columns for head in heads if isinstance(head, FixedBudget)] == list(range(1, 13))


def altered(layer: int, head: str, value: Any) -> list[dict[str, Any]]:
    changed = grid()
    changed[layer] = changed[layer] | {head: value}
    return changed


def without(layer: int, head: str) -> list[dict[str, Any]]:
    changed = grid()
    del changed[layer][head]
    return changed


WRONG: dict[str, Any] = {
    "is not valid JSON": "[{",
    "0: the key '0' is given twice": f'[{{"0": {json.dumps(FIXED)}, "0": {json.dumps(FIXED)}}}]',
    "must be a non-empty list of layers": {},
    "layer 1: must be an object of heads": [grid()[0], []],
    "layer 1: must have heads 0 to 2, differs in 2": without(1, "2"),
    "layer 0: must have heads 0 to 2, differs in 2, two": [
        {"0": FIXED, "1": FIXED, "two": FIXED},
        grid()[0],
    ],
    "layer 1, head 2: must be [name, columns, slashes, score], not [1, 2]": altered(1, "2", [1, 2]),
    "layer 1, head 2: pattern 'block_sparse' is neither": altered(1, "2", ["block_sparse", 1, 2, 0.0]),
    "layer 0, head 1: columns must be a whole number from 1, not 0": altered(0, "1", ["vertical_and_slash", 0, 9, 0.0]),
    "slashes must be a whole number from 1, not 2.5": altered(0, "1", ["vertical_and_slash", 1, 2.5, 0.0]),
    "columns must be a whole number from 1, not True": altered(0, "1", ["vertical_and_slash", True, 2, 0.0]),
    "slashes must be a whole number from 1, not 1e+99": altered(0, "1", ["vertical_and_slash", 1, 1e99, 0.0]),
    "score must be a finite number, not 'high'": altered(0, "1", ["vertical_and_slash", 1, 2, "high"]),
    "0.1.3: NaN is not a number": altered(0, "1", ["vertical_and_slash", 1, 2, float("nan")]),
    "columns must be [p, cap], not 0.9": altered(0, "1", ["flex_vertical_and_slash", 0.9, [0.9, 1], 0.0]),
    "slashes p must be above 0 and at most 1, not 1.5": altered(
        0, "1", ["flex_vertical_and_slash", [0.9, 1], [1.5, 1], 0.0]
    ),
    "columns cap must be a whole number from 1, not 0": altered(
        0, "1", ["flex_vertical_and_slash", [0.9, 0], [0.9, 1], 0.0]
    ),
}


@pytest.mark.parametrize("message", list(WRONG))
def test_wrong_files_are_refused(tmp_path: Path, message: str) -> None:
    path = written(tmp_path / "settings.json", WRONG[message])
    with pytest.raises(InputError) as caught:
        read_published(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_settings_of_another_model_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "s.json", grid(layers=2, heads=3))
    with pytest.raises(InputError, match="layers: has 2 layers, the model has 36"):
        read_published(path, layers=36, heads=3)
    with pytest.raises(InputError, match="must have heads 0 to 15"):
        read_published(path, layers=2, heads=16)
    with pytest.raises(InputError, match="cannot be read"):
        read_published(tmp_path / "absent.json")
