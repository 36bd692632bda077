"""Is a model object what its class and configuration make, which is what the audit proved things about?

Modules, methods, hooks and settings that came later may mix tokens, or count them, without the audit having seen it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from .small import make

# peft's adapters that see one token at a time; quantized linear layers; wrappers that change nothing.
HARMLESS_MODULES = (
    "peft.tuners.lora.", "peft.tuners.ia3.", "peft.tuners.vera.", "peft.tuners.oft.", "peft.tuners.ln_tuning.",
    "peft.tuners.miss.", "peft.tuners.psoft.", "peft.tuners.delora.", "peft.tuners.trainable_tokens.",
    "peft.tuners._buffer_dict.", "peft.tuners.tuners_utils.", "peft.utils.other.", "bitsandbytes.nn.", "torch._dynamo.",
    "torch.nn.modules.container.", "torch.nn.modules.dropout.", "torch.nn.modules.linear.Identity",
)  # fmt: skip
OURS = f"{str(__package__).rpartition('.')[0]}."
HARMLESS_CODE = ("torch.", "transformers.", "accelerate.", "peft.", "liger_kernel.", OURS)
# Settings of a module that say nothing of what it computes, or that other checks hold.
UNCOMPARED = frozenset(
    {"training", "gradient_checkpointing", "max_seq_len_cached", "num_embeddings", "out_features", "name_or_path",
     "is_hf_initialized", "in_features", "fused", "merged"}
)  # fmt: skip

# What runs a model's experts: transformers' loop, and torch's products. Others come from elsewhere.
PROVEN_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")


def refuse_strangers(
    model: PreTrainedModel, model_class: type[PreTrainedModel], known: set[str], *, allow_hooks: bool = False
) -> None:
    """Raise UnsupportedError, naming the module, for what the audited class does not make by itself.

    known: the classes of modules that it makes. allow_hooks: whole sequences run, so that hooks see what they would.
    """
    if not allow_hooks:
        _refuse_global_hooks()
    experts = getattr(model.config, "_experts_implementation", None)
    if experts not in PROVEN_EXPERTS:
        raise UnsupportedError(f"is {experts!r}: nothing was proven about it; take grouped_mm, batched_mm or eager",
                               field="experts_implementation")  # fmt: skip
    with torch.device("meta"):
        expected = dict(make(type(model.config).from_dict(model.config.to_dict()), model_class).named_modules())
    for name, module in model.named_modules():
        where = name or type(model).__name__
        plain = class_name(plain_class(type(module)))
        if plain not in known and not plain.startswith(HARMLESS_MODULES):
            told = f"is a {plain}, which {model_class.__name__} does not have by itself"
            raise UnsupportedError(f"{told}: the audit proves nothing about it", field=where)
        for code in () if allow_hooks else _added_code(module, expected.get(name)):
            raise UnsupportedError(f"has a method or hook of {code}: the audit proves nothing about it", field=where)
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise UnsupportedError(f"drops {module.p}; dropout is not supported: set its p to 0", field=where)
        _compare_settings(where, module, expected.get(name))
    adapters = getattr(model, "peft_config", None)
    for adapter in adapters.values() if isinstance(adapters, dict) else ():
        if getattr(adapter, "alora_invocation_tokens", None):
            raise UnsupportedError("counts tokens from where its adapter is invoked, in the shard", field="alora")


def class_name(one: type) -> str:
    """Return where a class is defined and what it is called."""
    return f"{one.__module__}.{one.__qualname__}"


def plain_class(one: type) -> type:
    """Return the class that FSDP, which puts itself in front of it, was given."""
    if any(base.__module__.startswith("torch.distributed.") for base in one.__mro__):
        return next(base for base in one.__mro__ if not base.__module__.startswith("torch.distributed.")
                    and not base.__qualname__.startswith("FSDP"))  # fmt: skip
    return one


def _added_code(module: Module, expected: Module | None) -> Iterator[str]:
    """Yield where code comes from that somebody put into this module: methods, a loss, hooks.

    expected: the module as its class makes it, which may have functions of its own too.
    """
    made = {} if expected is None else vars(expected)
    added = [
        value
        for name, value in vars(module).items()
        if name == "_loss_function" or (callable(value) and hasattr(type(module), name) and name not in made)
    ]
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        added += list(getattr(module, hooks, {}).values())
    for home in map(_home_of, added):
        if "neftune" in home or not f"{home}.".startswith(HARMLESS_CODE):
            yield home


def _home_of(code: Any) -> str:
    """Return where a function comes from, and what it is called."""
    while isinstance(code, functools.partial):
        code = code.func
    name = getattr(code, "__module__", None) or type(code).__module__
    return f"{name}.{getattr(code, '__qualname__', type(code).__qualname__)}"


def _refuse_global_hooks() -> None:
    """Refuse hooks that torch calls for every module of the process."""
    for home in map(_home_of, global_hooks()):
        if not f"{home}.".startswith(HARMLESS_CODE):
            told = f"{home} is called for every module of this process: the audit proves nothing about it"
            raise UnsupportedError(told, field="global hook")


def global_hooks() -> list[Any]:
    """Return what torch calls before and after every module of the process."""
    names = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks",
             "_global_backward_hooks")  # fmt: skip
    return [hook for name in names for hook in getattr(torch.nn.modules.module, name, {}).values()]


def _compare_settings(where: str, module: Module, expected: Module | None) -> None:
    """Refuse a module whose plain settings are not those that the configuration gives: it was changed in between."""
    if expected is None or type(expected) is not plain_class(type(module)):
        return
    for name, value in vars(expected).items():
        if name.startswith("_") or name in UNCOMPARED or not isinstance(value, bool | int | float | str):
            continue
        own = vars(module).get(name, value)
        if own != value and isinstance(own, bool | int | float | str):
            told = f"is {own!r}, the model's configuration makes it {value!r}: nothing was proven about it"
            raise UnsupportedError(told, field=f"{where}.{name}")
