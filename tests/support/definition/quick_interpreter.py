"""Triton's interpreter without work whose result it throws away: the same kernels, checks and numbers in less time.

At every call of one kernel function by another it patches `triton.language` anew, which is patched already for the
whole launch; and for every sum and product of integers it computes whether they overflow, and drops the answer unless
it runs in debug mode. What it works out of nothing but types and shapes, again for every number that a kernel touches,
is kept: see quick_types.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import quick_types

INTERPRETER = "triton.runtime.interpreter"
USED = ("_patch_lang", "_LangPatchScope", "_patch_attr", "_get_np_dtype", "interpreter_semantic", "InterpreterBuilder")
AS_IT_COMES: list[tuple[Any, str, Any]] = []  # what was changed: (object, attribute, value before)


def quicken() -> None:
    """Change the interpreter where it was imported and was not changed yet; do nothing for a Triton that differs."""
    module: Any = sys.modules.get(INTERPRETER)
    if module is None or AS_IT_COMES or not all(hasattr(module, name) for name in USED):
        return
    builder = module.interpreter_builder
    changes = [(module, "_patch_lang", _patch_once_a_launch(module)), *quick_types.changes(module)]
    if not builder.options.debug:
        changes.append((builder, "options", replace(builder.options, sanitize_overflow=False)))
    for changed, name, value in changes:
        AS_IT_COMES.append((changed, name, getattr(changed, name)))
        setattr(changed, name, value)


def _patch_once_a_launch(module: Any) -> Any:
    patch, patched = module._patch_lang, set[int]()

    def patch_once(function: Any) -> Any:
        """Patch what a function sees, unless that was done in this launch."""
        seen = id(function.__globals__)
        if seen in patched:
            return module._LangPatchScope()
        scope = patch(function)
        if not patched:  # the launch: its end restores what it patched
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.add(seen)
        return scope

    return patch_once
