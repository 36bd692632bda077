"""What `nvidia-smi topo -m` says of a node: its GPUs, the links between them, its network cards.

The text is a matrix of devices: `X` for a device and itself, `NV18` for 18 NVLinks, else how far a path leads through
PCI Express: PIX, PXB (switches), PHB (a host bridge), NODE (a NUMA node), SYS (between sockets).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...traces.errors import InputError, UnsupportedError, shown
from .texts import text_lines

NEAR = ("PIX", "PXB")  # a card that GPUs reach without leaving their PCI Express switches
PATHS = (*NEAR, "PHB", "NODE", "SYS")  # from near to far
MOST_LINKS = 18  # NVLinks of a GPU, of any generation so far


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One node. nvlinks: of each pair of GPUs, 0 for one GPU; cards: those that GPUs will use, by their names.

    far_cards: those beside them, which no GPU is near to; remote_gpus: GPUs that are near to none of `cards`.
    """

    gpus: int
    nvlinks: int
    cards: tuple[str, ...] = ()
    far_cards: tuple[str, ...] = ()
    remote_gpus: tuple[str, ...] = ()

    @property
    def may_be_a_mesh(self) -> bool:
        """Whether the NVLinks of a pair may be wires of its own rather than ways through a switch."""
        return self.gpus > 2 and self.nvlinks * (self.gpus - 1) <= MOST_LINKS


def read_topology(path: Path) -> Topology:
    """Read a file with the text of `nvidia-smi topo -m`. Raises as `parse_topology` does."""
    return parse_topology(text_lines(path), path)


def parse_topology(lines: list[str], path: Path) -> Topology:
    """Read the lines of `nvidia-smi topo -m`. path: what errors call the text.

    Raises InputError where it is none or is cut, UnsupportedError where GPUs are not joined as a cluster file can say:
    all pairs alike, by NVLink.
    """
    devices, first = _header(lines, path)
    cells = _cells(lines[first:], devices, path)
    gpus = [name for name in devices if re.fullmatch(r"GPU\d+", name)]
    if missing := [name for name in gpus if name not in cells]:
        raise InputError(f"has no row for {', '.join(missing)}", source=path)
    nvlinks = _nvlinks(cells, gpus, path)
    everyone = [name for name in devices if name not in gpus]
    cards = [name for name in everyone if any(cells[gpu][name] in NEAR for gpu in gpus)]
    return Topology(
        gpus=len(gpus),
        nvlinks=nvlinks,
        cards=tuple(cards or everyone),
        far_cards=tuple(name for name in everyone if cards and name not in cards),
        remote_gpus=tuple(gpu for gpu in gpus if cards and not any(cells[gpu][name] in NEAR for name in cards)),
    )


def _header(lines: list[str], path: Path) -> tuple[list[str], int]:
    """Return the names of the matrix's columns, and the number of the line after them."""
    for number, line in enumerate(lines):
        names = line.split()
        if names[:1] == ["GPU0"] and "X" not in names:
            devices = names[: names.index("CPU")] if "CPU" in names else names
            if len(set(devices)) == len(devices):
                return devices, number + 1
    raise InputError("is not the matrix of `nvidia-smi topo -m`: no line names GPU0 and its columns", source=path)


def _cells(lines: list[str], devices: list[str], path: Path) -> dict[str, dict[str, str]]:
    """Return the matrix, by row and column; rows of other things (legends) are passed over."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        name, *values = line.split() or [""]
        if name not in devices or name in found:
            continue
        values = values[: len(devices)]
        for column, value in zip(devices, values, strict=False):
            known = value == "X" if column == name else value in PATHS or re.fullmatch(r"NV[1-9]\d{0,2}", value)
            if not known:
                raise InputError(f"{shown(value)} is no link to {column}", source=path, field=name)
        if len(values) < len(devices):
            raise InputError(f"has {len(values)} of {len(devices)} columns", source=path, field=name)
        found[name] = dict(zip(devices, values, strict=True))
    return found


def _nvlinks(cells: dict[str, dict[str, str]], gpus: list[str], path: Path) -> int:
    """Return how many NVLinks every pair of GPUs has; refuse where they are not all alike."""
    pairs = {(a, b): cells[a][b] for a in gpus for b in gpus if a != b}
    for (a, b), link in pairs.items():
        if pairs[b, a] != link:
            raise InputError(f"{a} to {b} is {link}, {b} to {a} is {pairs[b, a]}", source=path)
    for (a, b), link in pairs.items():
        if not link.startswith("NV"):
            problem = (
                f"{a} and {b} have no NVLink ({link}); a cluster file has one kind of link, between all GPUs alike"
            )
            raise UnsupportedError(problem, source=path)
    kinds = {link: pair for pair, link in pairs.items()}
    if len(kinds) > 1:
        told = ", ".join(f"{link} (as {a} and {b})" for link, (a, b) in sorted(kinds.items()))
        problem = f"pairs of GPUs have {told}: wires of unequal width, where a cluster file has a switch"
        raise UnsupportedError(problem, source=path)
    return int(next(iter(kinds))[2:]) if kinds else 0
