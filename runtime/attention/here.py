"""Whether a plan's kernels can run on this machine: asked before any rank is started."""

from __future__ import annotations

from pathlib import Path

from ...planner.schedule.backends import facts_of
from ...traces.errors import InputError


def require_backend_here(
    backend: str, *, device: str, source: str | Path | None = None, field: str = "kernels.backend"
) -> None:
    """Raise InputError, naming source and field, where kernels for GPUs alone are to run on a CPU, the `device`.

    Triton's interpreter, for tests, runs its kernels on a CPU.
    """
    if device == "cpu" and facts_of(backend).needs_gpu and not _interpreted():
        told = f"{backend!r} kernels need a GPU, and this runs on the CPU: use --backend blockwise"
        raise InputError(told, source=source, field=field)


def _interpreted() -> bool:
    try:
        from triton import knobs
    except ModuleNotFoundError:
        return False
    return bool(knobs.runtime.interpret)
