"""What every benchmark shares: result files that say where their figures come from."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    memory_bytes = torch.cuda.get_device_properties(0).total_memory
    return {"device": torch.cuda.get_device_name(0), "count": count, "memory_bytes": memory_bytes}


def versions() -> dict[str, str]:
    """Return the versions that decide speed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, nccl.version()))
    for name in ("triton", "transformers", "flash_attn"):
        if hasattr(sys.modules.get(name), "__version__"):
            found[name] = sys.modules[name].__version__
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
    gpus: how many of this host's took part.
    """

    def __init__(self, benchmark: str, *, folder: Path = RESULTS, gpus: int | None = None) -> None:
        now, where = datetime.now(UTC), hardware(gpus)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        date = now.isoformat(timespec="seconds")
        self._head = {"benchmark": benchmark, "command": command, "date": date, "hardware": where}
        device = str(where["device"]).lower().replace("nvidia ", "").replace(" ", "-") or "cpu"
        self.path = folder / f"{benchmark}-{device}x{where['count']}-{now:%Y-%m-%dT%H%M%SZ}.json"

    def write(self, rows: Sequence[Mapping[str, Any]], *, finished: bool = True) -> Path:
        """Write all rows there are, which are flat; return the file's path."""
        state = {} if finished else {"unfinished": True}
        write_json(self.path, self._head | {"versions": versions()} | state | {"rows": list(rows)})
        return self.path

    def write_as_they_come(
        self, rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str], *, first_rank: bool = True
    ) -> list[dict[str, Any]]:
        """Take all rows and return them; print a line of each and write it at once, on the first rank only."""
        found = []
        for row in rows:
            found.append(row)
            if first_rank:
                print(line(row), flush=True)
                self.write(found, finished=False)
        if first_rank:
            self.write(found)
        return found
