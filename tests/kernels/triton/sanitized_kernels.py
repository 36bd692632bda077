"""Kernels on small inputs, to be run under compute-sanitizer: `python sanitized_kernels.py`."""

from __future__ import annotations

from dataclasses import replace

import torch

from gpu_kernel_cases import CASES, build, run

SMALL = [replace(case, tokens=min(case.tokens, 256), padding=min(case.padding, 24)) for case in CASES[:4]]


def main() -> None:
    """Run forward and backward of each case once, on memory that no cache of torch's holds together."""
    for case in SMALL:
        tensors, mask = build(case)
        run(tensors, mask, case.head_dim**-0.5, "triton")
        torch.cuda.synchronize()
        print(case, flush=True)


if __name__ == "__main__":
    main()
