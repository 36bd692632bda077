"""What every benchmark shares: result files that say where their figures come from."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from ...runtime.baselines.flash4 import NAME as FLASH4_RING
from ...runtime.baselines.flash4 import require_flash4
from ...traces.errors import UnsupportedError
from ...traces.files import write_json

RESULTS = Path(__file__).parents[1] / "results"


def hardware(gpus: int | None = None) -> dict[str, Any]:
    """Return what the figures were measured on; gpus: how many of this host's GPUs took part."""
    if not torch.cuda.is_available():
        return {"device": platform.processor() or platform.machine(), "count": 1}
    count = torch.cuda.device_count() if gpus is None else gpus
    return {"device": torch.cuda.get_device_name(0), "count": count, "memory_bytes": _memory_bytes()}


def versions() -> dict[str, str]:
    """Return the versions that decide speed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, nccl.version()))
    for name in ("triton", "transformers", "flash_attn", "simpy"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            found[name] = module.__version__
    if "flash_attn.cute.interface" in sys.modules:
        found |= {name: metadata.version(name) for name in ("flash-attn-4", "nvidia-cutlass-dsl")}
    return found


def require_flash4_ring(implementations: Sequence[str], *, head_dim: int, toy: bool) -> None:
    """End with one line and exit code 2 where the ring over flash-attn-4 is asked for and cannot run here."""
    if FLASH4_RING not in implementations:
        return
    device_type = "cuda" if torch.cuda.is_available() and not toy else "cpu"
    try:
        require_flash4(device_type, dtype=torch.bfloat16, head_dim=head_dim)
    except UnsupportedError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class ResultFile:
    """`<benchmark>-<hardware>-<time>.json` in `folder`, which can be written again as rows come in.

    Until the last time it says `"unfinished": true`: what a time limit or a failure leaves is a result too.
    gpus: how many of this host's took part; simulated: hardware ("device", "count") that stood in place of this host's.
    """

    def __init__(
        self,
        benchmark: str,
        *,
        folder: Path = RESULTS,
        gpus: int | None = None,
        simulated: Mapping[str, Any] | None = None,
    ) -> None:
        now = datetime.now(UTC)
        self._head: dict[str, Any] = {
            "benchmark": benchmark,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": now.isoformat(timespec="seconds"),
            "hardware": simulated or hardware(gpus),
        }
        where = self._head["hardware"]
        device = str(where["device"]).lower().replace("nvidia ", "").replace(" ", "-") or "cpu"
        self.path = folder / f"{benchmark}-{device}x{where['count']}-{now:%Y-%m-%dT%H%M%SZ}.json"

    def write(self, rows: Sequence[Mapping[str, Any]], *, finished: bool) -> None:
        """Write all rows there are; they are flat."""
        state = {} if finished else {"unfinished": True}
        write_json(self.path, self._head | {"versions": versions()} | state | {"rows": list(rows)})


def write_result(
    benchmark: str, rows: Sequence[Mapping[str, Any]], *, folder: Path = RESULTS, gpus: int | None = None
) -> Path:
    """Write all rows of a run into `folder` and return the file's path."""
    result = ResultFile(benchmark, folder=folder, gpus=gpus)
    result.write(rows, finished=True)
    return result.path


def _memory_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory
