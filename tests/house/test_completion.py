"""Completion in shells: verbs without torch, and names that options take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsering import cli
from sparsering.planner.cost.cluster import preset_names
from sparsering.planner.layouts.registry import layout_names
from sparsering.traces.synthetic import GENERATORS

LOADED = "\nassert not {'torch', 'transformers'} & set(sys.modules)"


def completed(*words: str, also: str = "") -> list[str]:
    """Return what bash would be offered for the last of these words."""
    asked = {"_SPARSERING_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["sparsering", *words])}
    environment = os.environ | asked | {"COMP_CWORD": str(len(words)), "PYTHONSAFEPATH": "1"}
    program = f"import sys; from sparsering import cli\ntry:\n cli.main()\nexcept SystemExit: pass{also}"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_verbs_are_listed_without_torch():
    assert completed("", also=LOADED) == list(cli.VERBS)
    assert completed("si", also=LOADED) == ["simulate"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("plan", "--cluster", "h100"), [name for name in preset_names() if name.startswith("h100")]),
        (("simulate", "plan.json", "--cluster", ""), preset_names()),
        (("plan", "--layout", ""), list(layout_names())),
        (("synthesize", ""), list(GENERATORS)),
        (("plna", "--lay"), []),
    ],
)
def test_names_are_completed(words: tuple[str, ...], expected: list[str]):
    assert completed(*words, also=LOADED) == expected
