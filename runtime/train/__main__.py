"""`torchrun … -m sparsering.runtime.train config.yaml`: one rank of a training run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...traces.errors import InputError
from ..comm.lost import RankLost
from .command import run_rank
from .config import load_config
from .loop import TrainingError


def main() -> int:
    """Train as the rank that the environment says; 2 and one line for unusable input, 1 for a broken run."""
    parser = argparse.ArgumentParser(prog="sparsering.runtime.train", description=__doc__)
    parser.add_argument("config", type=Path, help="the run's YAML file")
    try:
        return run_rank(load_config(parser.parse_args().config))
    except InputError as error:
        print(f"sparsering: {error}", file=sys.stderr)
        return 2
    except (TrainingError, RankLost) as error:
        print(f"sparsering: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
