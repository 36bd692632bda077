"""Which launches are measured to price all others: small and large shards, sparse and dense, of every kind of mask."""

from __future__ import annotations

from dataclasses import replace

from ...traces.synthetic import GENERATORS
from .points import Case

# The sequence as a part of the longest, and ranks that share it: of 256K tokens, shards of 8K to 64K.
SHARES = ((8, 4), (4, 2), (2, 8), (2, 2), (1, 4), (1, 8))
DENSITIES = (0.01, 0.03, 0.1)
# Synthetic masks of an asked density, diagonals first; documents with diagonals, and with their blocks listed.
OF_DENSITY = [name for name, made in GENERATORS.items() if "density" in made.uses and "skew" not in made.uses]
KINDS = (*OF_DENSITY, "packed-documents", "listed-documents")
COLUMNS = (256, 1024)
SEED = 31


def calibration_cases(*, longest_tokens: int, joins_keys: bool) -> list[Case]:
    """Return the launches to measure for one backend and shape of heads, of sequences up to so many tokens.

    joins_keys: whether the backend attends several key shards in one launch.
    """
    cases = []
    for kind in KINDS:
        for number, (part, ranks) in enumerate(SHARES):
            for place, density in enumerate(DENSITIES):
                case = Case(
                    kind=kind,
                    seq_len_tokens=longest_tokens // part,
                    world_size=ranks,
                    rank=ranks - 1 - (number + place) % 2,
                    density=density,
                    joined=joins_keys and (number + place) % 2 == 1,
                    seed=SEED,
                )
                cases.append(case)
    cases += [
        replace(cases[0], seq_len_tokens=longest_tokens // part, world_size=4, rank=2, density=0.03, columns=columns)
        for part in (4, 1)
        for columns in COLUMNS
    ]
    return cases
