"""liger-kernel's norms, rotation and MLP in one model, without touching others of its class."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel


def fuse_layers(model: PreTrainedModel) -> None:
    """Give a model liger-kernel's fused layers; attention and loss stay as they are.

    liger-kernel changes the module that defines the model's class, too: classes there are put back, as this model's own
    parts have been changed already; functions, which all models of the class call, are fused on GPUs alone. So models
    on the CPU (the audit's small copies, others of this process) go on as they are.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
    for name, plain in before.items():
        fused = vars(module)[name]
        if fused is not plain:
            setattr(module, name, plain if isinstance(plain, type) else _on_gpus(fused, plain))


def _on_gpus(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of tensors that is the fused one where the first of them is on a GPU."""
    original = getattr(plain, "__wrapped__", plain)  # another model was fused before

    @wraps(original)
    def by_device(first: Any, *arguments: Any, **keywords: Any) -> Any:
        return (fused if first.is_cuda else original)(first, *arguments, **keywords)

    return by_device
