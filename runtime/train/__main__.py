"""`torchrun … -m sparsering.runtime.train config.yaml`: one rank of a training run."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
