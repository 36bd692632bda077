"""The best placement there is of a few blocks: a mixed-integer program that HiGHS solves or bounds.

Minimise T over x in {0, 1}^[N, W]: every block has one rank, every rank equally many blocks, and no rank's load is
above T. Ranks are alike, so the r heaviest blocks lie on the first r ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

NODE_LIMIT = 4000  # of the search tree: a limit in seconds would make results hang on the machine
SURE = 1e-3  # relative distance from the best at which the search may end


class Least(NamedTuple):
    """The least load of a busiest rank: the best found, and what none can be below."""

    found: float
    bound: float


def least_busiest(load: NDArray[np.float64], ranks: int) -> Least:
    """Return the least load of the busiest of so many ranks. load: float64 [N], of each block, N a multiple of them."""
    blocks = len(load)
    x = sparse.csr_array(sparse.eye_array(blocks * ranks, blocks * ranks + 1))  # all but the last variable, T
    of_block = sparse.csr_array(sparse.kron(sparse.eye_array(blocks), np.ones((1, ranks)))) @ x
    of_rank = sparse.csr_array(sparse.kron(np.ones((1, blocks)), sparse.eye_array(ranks))) @ x
    loads = sparse.csr_array(sparse.kron(load[None, :], sparse.eye_array(ranks))) @ x
    above = sparse.csr_array((-np.ones(ranks), (np.arange(ranks), np.full(ranks, blocks * ranks))), shape=loads.shape)
    allowed = np.ones((blocks, ranks))
    for place, block in enumerate(np.argsort(-load, kind="stable")[: ranks - 1]):
        allowed[block, place + 1 :] = 0
    least, most = np.append(np.zeros(blocks * ranks), load.sum() / ranks), np.append(allowed.ravel(), np.inf)
    bounds = Bounds(least, most)  # pyright: ignore[reportArgumentType]  # its stub knows single numbers alone
    solved = milp(
        np.append(np.zeros(blocks * ranks), 1.0),
        constraints=[
            LinearConstraint(of_block, 1, 1),
            LinearConstraint(of_rank, blocks // ranks, blocks // ranks),
            LinearConstraint(loads + above, -np.inf, 0),
        ],
        bounds=bounds,
        integrality=np.append(np.ones(blocks * ranks), 0),
        options={"node_limit": NODE_LIMIT, "mip_rel_gap": SURE},
    )
    found = np.inf if solved.fun is None else float(solved.fun)
    return Least(found=found, bound=float(solved.mip_dual_bound))
