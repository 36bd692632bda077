"""`torchrun … -m sparsering.runtime.train config.yaml`: one rank of a training run."""

import os
import sys

from ..comm.start import QUIET
from .command import main

if __name__ == "__main__":
    os.environ.update(QUIET | os.environ)  # read by torch, which is imported later
    sys.exit(main())
