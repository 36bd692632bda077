"""torchrun as `sparsering train` starts it: its ranks say why they end in one line, which torchrun does not repeat.

    python -m sparsering.runtime.comm.quiet_torchrun <torchrun's arguments>

Ends with the exit code of the first rank that failed, or 128 + the number of the signal that ended this process.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .start import killed_ranks


def main() -> int:
    """Run torchrun with this process's arguments and return the exit code."""
    logging.disable(logging.CRITICAL)
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return _failed(error, int(arguments.nproc_per_node))
    return 0


def _failed(error: ChildFailedError, world_size: int) -> int:
    """Return the exit code of the first rank that failed; say so where it could not, as a signal ended it."""
    code = error.get_first_failure()[1].exitcode
    if code >= 0:
        return code
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    print(f"sparsering: {killed_ranks(codes, world_size=world_size)}", file=sys.stderr, flush=True)
    return 128 - code


if __name__ == "__main__":
    sys.exit(main())
