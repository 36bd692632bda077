"""Which launches are measured to price all others: small and large shards, sparse and dense, of every kind of mask."""

from __future__ import annotations

from dataclasses import replace

from .points import Case

# Tokens of the sequence, and ranks that share them: shards of 8K to 64K tokens.
SHARES = ((32768, 4), (65536, 2), (131072, 8), (131072, 2), (262144, 4))
DENSITIES = (0.01, 0.03, 0.1)
KINDS = ("vertical-slash", "xattention", "moba-block", "packed-documents", "listed-documents")
COLUMNS = (256, 1024)
SEED = 31


def calibration_cases(*, longest_tokens: int = 262144) -> list[Case]:
    """Return the launches to measure for one backend and shape of heads; none of a longer sequence than that."""
    cases = []
    for kind in KINDS:
        for number, (seq_len_tokens, ranks) in enumerate(SHARES):
            for place, density in enumerate(DENSITIES):
                case = Case(
                    kind=kind,
                    seq_len_tokens=seq_len_tokens,
                    world_size=ranks,
                    rank=ranks - 1 - (number + place) % 2,
                    density=density,
                    joined=(number + place) % 2 == 1,
                    seed=SEED,
                )
                cases.append(case)
    cases += [
        replace(cases[0], seq_len_tokens=seq_len_tokens, world_size=4, rank=2, density=0.03, columns=columns)
        for seq_len_tokens in (65536, 262144)
        for columns in COLUMNS
    ]
    return [case for case in cases if case.seq_len_tokens <= longest_tokens]
