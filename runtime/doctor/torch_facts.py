"""What the installed torch is and finds, asked of torch itself; nothing here fails where it is absent or broken."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """cuda: what torch was built for, as "13.0", None: CPUs; nccl: its version, None where torch has none.

    import_error: why torch, which is installed, cannot be imported; gpus: how many it finds; backends: the verdict of
    every kernel backend, backends_error: why there is none.
    """

    version: str | None = None
    import_error: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    gpus: int = 0
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    backends_error: str | None = None


@cache  # they stay what they are while the process lives
def torch_facts() -> TorchFacts:
    """Import torch, ask it, and try every backend."""
    try:
        torch = import_module("torch")
        version = str(torch.__version__)
    except Exception as error:  # a diagnosis reports whatever keeps torch from being imported
        return TorchFacts(import_error=_told(error))
    backends: dict[str, dict[str, Any]] = {}
    backends_error = None
    try:
        from ...kernels.tools.self_check import backend_verdicts

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the problems are small; threads that wait for busy cores would take far longer
        backends = backend_verdicts()
        torch.set_num_threads(threads)
    except Exception as error:  # likewise
        backends_error = _told(error)
    return TorchFacts(
        version=version, cuda=torch.version.cuda, nccl=_nccl(torch), gpus=torch.cuda.device_count(),
        backends=backends, backends_error=backends_error,
    )  # fmt: skip


def _nccl(torch: Any) -> str | None:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
