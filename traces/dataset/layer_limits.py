"""What a model's own layers limit attention to: sliding windows and chunks by layer, as fields of a model's shape.

Traces and plans both have them. Files that were written before there were such fields keep their digests: where no
layer has a limit the field is None, and left out.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

# Longer than any sequence that is read: a window beyond it limits nothing.
MAX_LIMIT_TOKENS = 1 << 27
LAYER_LIMITS = ("windows", "chunks")
LayerTokens: TypeAlias = tuple[Annotated[int, Field(ge=0, le=MAX_LIMIT_TOKENS)], ...] | None


def limit_of_layers(tokens: tuple[int, ...] | None, layers: int | None) -> tuple[int, ...] | None:
    """Return one number of tokens a layer as a shape holds them: None where all are 0.

    layers: of the model; None where that was wrong itself. ValueError where there are more or fewer numbers.
    """
    if tokens is not None and layers is not None and len(tokens) != layers:
        raise ValueError(f"has {len(tokens)} entries for {layers} layers")
    return tokens if tokens and any(tokens) else None
