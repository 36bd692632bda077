"""Triton's interpreter without work whose result it throws away: the same kernels, checks and numbers in half the time.

At every call of one kernel function by another it patches `triton.language` anew, which is patched already for the
whole launch; and for every sum and product of integers it computes whether they overflow, and drops the answer unless
it runs in debug mode.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

INTERPRETER = "triton.runtime.interpreter"
AS_IT_COMES: dict[str, Any] = {}  # what was changed, by name: empty before


def quicken() -> None:
    """Change the interpreter where it was imported and was not changed yet; do nothing for a Triton that differs."""
    module: Any = sys.modules.get(INTERPRETER)
    if module is None or AS_IT_COMES or not all(hasattr(module, name) for name in ("_patch_lang", "_LangPatchScope")):
        return
    options = module.interpreter_builder.options
    AS_IT_COMES.update(patch=module._patch_lang, options=options)
    if not options.debug:
        module.interpreter_builder.options = replace(options, sanitize_overflow=False)
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

    module._patch_lang = patch_once
