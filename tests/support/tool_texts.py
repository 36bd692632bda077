"""What `nvidia-smi topo -m` and nccl-tests would print of a node that does not exist, old forms and new."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LEGEND = """
Legend:

  X    = Self
  SYS  = a path over PCIe and between NUMA nodes
  NV#  = a bonded set of # NVLinks
"""
MIB = 1 << 20


def topology(
    gpus: int = 8,
    *,
    link: Callable[[int, int], str] = lambda a, b: "NV18",
    cards: Sequence[str] = (),
    near: Callable[[int, int], str] = lambda gpu, card: "PIX" if gpu == card else "NODE",
    legend: bool = True,
) -> str:
    """The matrix: link(a, b) of two GPUs, near(gpu, card) of a GPU and the number of a card."""
    names = [f"GPU{number}" for number in range(gpus)] + list(cards)

    def cell(a: int, b: int) -> str:
        if a == b:
            return " X "
        a, b = min(a, b), max(a, b)
        return link(a, b) if b < gpus else near(a, b - gpus) if a < gpus else "NODE"

    lines = ["\t".join(["\x1b[4m", *names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID\x1b[0m"])]
    for a, name in enumerate(names):
        tail = ["0-55,112-167", "0", "N/A"] if a < gpus else []
        lines.append("\t".join([name, *(cell(a, b) for b in range(len(names))), *tail]))
    told = [f"  {card}: mlx5_{number}" for number, card in enumerate(cards)]
    return "\n".join(lines) + (LEGEND + "\nNIC Legend:\n\n" + "\n".join(told) + "\n" if legend else "\n")


def nccl_table(
    *,
    test: str | None = "sendrecv_perf",
    hosts: Sequence[str] = ("node1",) * 8,
    gpu: str = "NVIDIA H100 80GB HBM3",
    sizes: Sequence[int] = tuple(1 << power for power in range(10, 29, 2)),
    latency_us: float = 20.0,
    bytes_per_us: float = 200e3,
    share: float = 1.0,
    wrong: str = "0",
    old: bool = False,
) -> str:
    """A test whose times lie on a line: latency_us + share * size / bytes_per_us, share: of a size that a port sends.

    old: the form before there were roots, with `error` in place of #wrong and no name of the test.
    """
    lines = [] if test is None else [f"# Collective test starting: {test}"]
    lines += [f"# nThread 1 nGpus {len(hosts)} minBytes {min(sizes)} maxBytes {max(sizes)} step: 4(factor)", "#"]
    lines += ["# Using devices"]
    for rank, host in enumerate(hosts):
        group = "" if old else "Group  0 "
        lines.append(f"#  Rank {rank:2} {group}Pid {4000 + rank} on {host:>10} device {rank:2} [0x1{rank}] {gpu}")
    lines += ["#", "#  size  count  type  redop  root  time  algbw  busbw  #wrong  time  algbw  busbw  #wrong"]
    for size in sizes:
        us = latency_us + share * size / bytes_per_us
        rate = size / us / 1e3
        place = f"{us:.4g} {rate:.2f} {rate * share:.2f}" if us < 1e6 else f"{us:.0f} {rate:.2f} {rate * share:.2f}"
        words = "float" if old else "float none -1"
        lines.append(f"{size:12} {size // 4:12} {words} {place} {wrong} {place} N/A")
    return "\n".join([*lines, "# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 12.3", "#"]) + "\n"
