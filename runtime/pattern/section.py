"""How a settings file says which pattern each layer has: rules that are tried in order, then the rest.

    selector: xattention          # of layers that no rule names
    settings: {mass: 0.9}
    layers:
      - {layers: "0,1", selector: dense}
      - {every: 4, selector: dense}                               # layers 0, 4, 8, …
      - {layers: "20-35", selector: sink-window, settings: {window_tokens: 8192}}

Layers that the model itself lets look less far than the sequence keep their own pattern, whatever a rule says.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ...kernels.select import DEFAULT_SELECTOR
from ...traces.errors import InputError
from ...traces.validation import validated
from ...traces.yaml_files import read_yaml

MAX_FILE_BYTES = 1 << 16


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SelectorSection(_Section):
    """selector: by name, or "dense". settings: its own, see `sparsering capture`."""

    selector: str = DEFAULT_SELECTOR
    settings: dict[str, int | float] = Field(default_factory=dict)


class LayerRule(SelectorSection):
    """Some layers: a list such as "0,5,30-35", by default all; every: of these, those whose number it divides."""

    layers: str = "all"
    every: int = Field(default=1, ge=1)

    def names(self, layer: int) -> bool:
        """Whether it is a rule for this layer."""
        chosen = parse_layers(self.layers)
        return layer % self.every == 0 and (chosen is None or layer in chosen)


class PatternSection(SelectorSection):
    """How patterns are chosen: by one selector, and others in some layers. layers: rules, of which the first counts."""

    layers: tuple[LayerRule, ...] = ()


def read_patterns(path: Path) -> PatternSection:
    """Read a settings file. InputError, in one line, names file, field and value."""
    return validated(PatternSection, read_yaml(path, max_bytes=MAX_FILE_BYTES), path)


def parse_layers(text: str, *, field: str = "layers") -> tuple[int, ...] | None:
    """Return the layers of a list such as "0,5,30-35", ascending; None for "all"."""
    if text.strip() == "all":
        return None
    chosen: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(item) > 20:
            raise InputError(f"{item.strip()!r} is neither a layer nor a range such as 4-7", field=field)
        stop = int(last) if dash else int(first)
        if not int(first) <= stop < 100_000:
            raise InputError(f"{item.strip()!r} is no ascending range", field=field)
        chosen.update(range(int(first), stop + 1))
    return tuple(sorted(chosen))
