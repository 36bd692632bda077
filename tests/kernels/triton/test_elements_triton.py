"""Windows, softcaps and learned sinks in the Triton kernels, interpreted, against the definition written out apart."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from element_cases import element_case
from element_checks import check_backend


@pytest.mark.parametrize("seed", [*range(100, 112), 7])
def test_triton_agrees_with_the_definition(seed: int) -> None:
    check_backend(element_case(seed), "triton")
