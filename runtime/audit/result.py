"""What the audit of a model says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...traces.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the audit of a model said. Only `right` counts; the rest says why.

    reason: one line, None when right; about: the setting, parameter or module that it is about
    shape: attention's, as the configuration states it and the small copy showed it
    errors: largest relative errors by road ("attach", "train") and kind ("loss", "logits", "gradient")
    modules: the classes that the small copy is made of; layers: how many it had
    digest: of all that it rests on, versions and sources too; model_sha256: of class, settings and length alone
    """

    model_type: str
    model_class: str
    seq_len_tokens: int
    digest: str
    model_sha256: str
    right: bool
    reason: str | None = None
    about: str | None = None
    shape: dict[str, int] | None = None
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    layers: int | None = None
    parameters: int | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def require(self, *, source: str | Path | None = None) -> None:
        """Raise UnsupportedError with the reason unless the model is right."""
        if not self.right:
            raise UnsupportedError(f"{self.reason}", source=source or self.model_class, field=self.about)
