"""What every test shares: Triton's interpreter where there is no GPU, few threads, repeatable hypothesis runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests share helpers (rank_pool, ring_cases, …); the safe path keeps their folder off sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support" / "ranks"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "support" / "definition"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "support" / "processes"))

from quick_interpreter import quicken
from rank_pool import RankPool

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def _has_cuda() -> bool:
    # The device file is asked first: importing torch takes seconds that most tests do not need.
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()


HAS_CUDA = _has_cuda()

if not HAS_CUDA:
    # Read by triton when it is imported, so it is set before any test module is.
    os.environ["TRITON_INTERPRET"] = "1"
# Read by torch when it is imported; inherited by the processes that tests start, which share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what is marked `gpu` on a machine without one."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup() -> None:
    """Have Triton's interpreter, where something imported it, do only what counts."""
    if not HAS_CUDA:
        quicken()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of worked cases, made by other code."""
    return GOLDEN


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[Callable[[int], RankPool]]:
    """Gloo process groups by world size, each started at its first use and kept to the end."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()
