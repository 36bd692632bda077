"""Installed packages against what this one, and torch, require: from installed metadata, without importing any."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "sparsering"
SHOWN = (
    "torch", "triton", "transformers", "safetensors", "liger-kernel", "flash-attn-4", "tensorboard", "wandb", "numpy",
    "pyarrow", "pydantic",
)  # fmt: skip
PRE_RELEASE = re.compile(r"\d(a|b|rc)\d|\.dev")  # as in 4.0.0b36


@dataclass(frozen=True, kw_only=True)
class Unmet:
    """A requirement, as `torch>=2.11`, that what is installed does not meet. installed: its version, None: absent."""

    requirement: str
    installed: str | None

    def __str__(self) -> str:
        found = "is not installed" if self.installed is None else f"is required, {self.installed} is installed"
        return f"{self.requirement} {found}"


def version_of(name: str) -> str | None:
    """Return the installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the installed versions of this package, of those that matter most, and of NCCL's wheel."""
    names = [OURS, *SHOWN, *_nccl_wheels()]
    return {name: version_of(name) for name in names}


def unmet(extra: str | None = None) -> list[Unmet]:
    """Return what this package requires, of itself or for one of its extras, and what does not meet it."""
    wanted = _requirements(OURS)
    chosen = [one for one in wanted if (extra is None) == (not _needs_extra(one)) and _applies(one, extra or "")]
    return [found for one in chosen if (found := _unmet(one)) is not None]


def triton_misfit() -> Unmet | None:
    """Return torch's own requirement on Triton where the installed Triton does not meet it; None where it does.

    A torch for CPUs requires none.
    """
    requirements = _requirements("torch") if version_of("torch") else []
    pinned = [one for one in requirements if canonicalize_name(one.name) == "triton" and _applies(one, "")]
    return _unmet(pinned[0]) if pinned else None


def install_command(missing: Iterable[Unmet]) -> str:
    """Return the pip command that installs what is missing, from the package index."""
    wanted = list(dict.fromkeys(one.requirement for one in missing))
    early = "--pre " if any(PRE_RELEASE.search(one) for one in wanted) else ""
    return f"pip install {early}{' '.join(shlex.quote(one) for one in wanted)}"


def _requirements(name: str) -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires(name) or ()]


def _needs_extra(requirement: Requirement) -> bool:
    return requirement.marker is not None and "extra" in str(requirement.marker)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _unmet(requirement: Requirement) -> Unmet | None:
    installed = version_of(requirement.name)
    if installed is not None and requirement.specifier.contains(installed, prereleases=True):
        return None
    return Unmet(requirement=f"{requirement.name}{requirement.specifier}", installed=installed)


def _nccl_wheels() -> list[str]:
    return sorted(
        {name for one in metadata.distributions() if (name := one.metadata["Name"] or "").startswith("nvidia-nccl-")}
    )
