"""Python runs this before anything else of a process whose PYTHONPATH begins here: it plants the run's fault."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("_planted_fault", Path(__file__).resolve().parents[1] / "plant.py")
if _spec is not None and _spec.loader is not None:
    _plant = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = _plant
    _spec.loader.exec_module(_plant)
    _plant.install()
