"""Run Triton's A100 path on a Hopper GPU: the very instructions that an A100 would run, checked and timed.

Triton compiles as for compute capability 8.0 (mma.sync and cp.async; neither wgmma nor TMA), and ptxas lowers that PTX
to sm_90. Times are a Hopper's, so only ratios say something, above all those to FlashAttention-2, whose kernels are of
that generation too. FlexAttention is compiled the same way. Shared memory of an A100 is not enforced here:
tests/kernels/tools/test_kernels_compile.py holds it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config as inductor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import driver

from ...kernels.triton import tuning


def enable() -> None:
    """Patch Triton, inductor and our own tuning in this process, before the first kernel is compiled."""
    torch.zeros(1, device="cuda")  # makes the driver that is patched
    backend: Any = compiler
    active: Any = driver.active
    arch_of, make_cubin = backend.sm_arch_from_capability, backend.CUDABackend.make_cubin

    def for_this_card(self: Any, source: Any, *rest: Any) -> Any:
        text = source if isinstance(source, str) else source.decode()
        assert ".target sm_80" in text, "this kernel was not compiled for sm_80"
        backend.sm_arch_from_capability = lambda capability: "sm_90"
        try:
            return make_cubin(self, source, *rest)
        finally:
            backend.sm_arch_from_capability = arch_of

    active.get_current_target = lambda: GPUTarget("cuda", 80, 32)
    backend.CUDABackend.make_cubin = for_this_card
    tuning.capability_of = lambda device: 80  # pyright: ignore[reportAttributeAccessIssue]
    # FlexAttention's templates, too, are chosen and compiled as on an A100, in this process: workers are not patched.
    inductor.compile_threads = 1
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
