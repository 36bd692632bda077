"""The direction of imports, read from the sources, and what may be absent for a house to work.

traces <- planner <- {simulator, runtime}; kernels <- runtime. Simulator and runtime never meet; kernels see tensors
only; traces, planner and simulator never import torch. The environment is read in cli.py and runtime/comm/mesh.py only.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from source_files import MAY_IMPORT, PACKAGE, ROOT, imported_modules, relative, sources

LAPTOP_HOUSES = ("traces", "planner", "simulator")
GPU_LIBRARIES = {"accelerate", "flash_attn", "liger_kernel", "safetensors", "torch", "transformers", "triton"}
PLAN_LIBRARIES = {"networkx", "plotly", "pyarrow", "pydantic", "scipy", "yaml"}
MAY_READ_ENVIRONMENT = {"cli.py", "runtime/comm/mesh.py"}
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb"}


def violations(source: str, path: str) -> list[str]:
    """Return what the file at `path` (relative to the root, inside a house) imports although it may not."""
    house = Path(path).parts[0]
    found = []
    for line, name in imported_modules(source, path):
        top, *rest = name.split(".")
        leaves_direction = top == PACKAGE and (not rest or rest[0] not in MAY_IMPORT[house])
        if name == "?":
            found.append(f"{path}:{line}: a computed import; only cli.py and __init__.py may")
        elif name == "" and (climbing := _climbing_strings(source)):
            found.append(f"{path}:{line}: a computed import beside {climbing}")
        elif top in MAY_IMPORT:
            found.append(f"{path}:{line}: imports {name} as a top-level module")
        elif leaves_direction or (house in LAPTOP_HOUSES and top in GPU_LIBRARIES):
            found.append(f"{path}:{line}: {house} imports {name}")
    return found + absolute_imports_of_ourselves(source, path)


def _climbing_strings(source: str) -> list[str]:
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [text for text in strings if isinstance(text, str) and re.fullmatch(r"\.\.+\w[\w.]*", text)]


def absolute_imports_of_ourselves(source: str, path: str) -> list[str]:
    """Return the imports that say `sparsering.…` where they should be relative."""
    found = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        found += [f"{path}:{node.lineno}: absolute import of {n}" for n in names if n.split(".")[0] == PACKAGE]
    return found


def environment_reads(source: str, path: str) -> list[str]:
    """Return the lines that touch the environment: os.environ, os.getenv, or a typer option's envvar."""
    found = []
    for node in ast.walk(ast.parse(source, path)):
        touched = ""
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES:
            touched = node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            touched = ", ".join(alias.name for alias in node.names if alias.name in ENVIRONMENT_NAMES)
        elif isinstance(node, ast.Call):
            touched = ", ".join(word.arg for word in node.keywords if word.arg == "envvar")
        if touched:
            found.append(f"{path}:{getattr(node, 'lineno', 0)}: {touched}")
    return found


def run_python(code: str, *, blocked: Iterable[str] = ()) -> str:
    """Run `code` in a fresh interpreter in which importing any of `blocked` fails; return what it prints."""
    guard = f"import sys\nfor name in {sorted(blocked)!r}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def module_names(*houses: str) -> list[str]:
    """Importable names of all modules of these houses."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sources(*houses)]
    return [".".join([PACKAGE, *(part for part in path.parts if part != "__init__")]) for path in paths]


@pytest.mark.parametrize("path", sources(*MAY_IMPORT), ids=relative)
def test_imports_follow_the_direction(path: Path):
    assert violations(path.read_text(), relative(path)) == []


@pytest.mark.parametrize("path", [ROOT / "__init__.py", ROOT / "cli.py", *sources(*MAY_IMPORT)], ids=relative)
def test_environment_is_read_in_two_files_only(path: Path):
    if relative(path) not in MAY_READ_ENVIRONMENT:
        assert environment_reads(path.read_text(), relative(path)) == []


@pytest.mark.parametrize("path", sources("tests"), ids=relative)
def test_tests_import_the_installed_name(path: Path):
    tops = {name.partition(".")[0] for _, name in imported_modules(path.read_text(), relative(path))}
    assert tops.isdisjoint(MAY_IMPORT), "tests import sparsering.<house>"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("planner/search.py", "from ..simulator.engine import simulate"),
        ("planner/search.py", "from .. import simulator"),
        ("planner/search.py", "def f():\n    import torch.nn"),
        ("planner/search.py", "import sparsering.traces.pattern"),
        ("planner/search.py", "from traces.pattern import VerticalSlash"),
        ("planner/search.py", "import importlib\nimportlib.import_module('torch')"),
        ("planner/search.py", "from importlib import import_module\nimport_module(name)"),
        ("kernels/api.py", "import importlib\nimportlib.import_module('..traces.pattern', __package__)"),
        ("kernels/api.py", "import importlib\nx = '..traces.pattern'\nimportlib.import_module(x, __package__)"),
        ("simulator/engine.py", "from ..runtime.ring import play"),
        ("simulator/engine.py", "from ..cli import app"),
        ("runtime/ring.py", "from ..simulator.engine import simulate"),
        ("runtime/ring.py", "import kernels"),
        ("kernels/api.py", "from ..traces.pattern import VerticalSlash"),
        ("kernels/deep/api.py", "from ...traces.pattern import VerticalSlash"),
        ("traces/pattern.py", "from ..planner.plan import Plan"),
    ],
)
def test_the_check_sees_a_wrong_import(path: str, source: str):
    assert violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("planner/search.py", "from ..traces.pattern import VerticalSlash\nfrom .plan import Plan\nimport numpy"),
        ("runtime/ring.py", "import torch\nfrom ..kernels import api\nfrom ..planner.plan import Plan"),
        ("kernels/deep/api.py", "from ..mask import AttentionMask\nimport triton"),
        ("kernels/api.py", "import importlib\nx = '.triton_backend'\nimportlib.import_module(x, __package__)"),
    ],
)
def test_the_check_lets_a_right_import_pass(path: str, source: str):
    assert violations(source, path) == []


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['RANK']", "import os\nos.getenv('RANK')", "from os import environ", "f(envvar='X')"],
)
def test_the_check_sees_a_read_of_the_environment(source: str):
    assert environment_reads(source, "runtime/ring.py")


def test_kernels_is_not_ours_under_safe_path():
    origin = run_python(
        "import sparsering, importlib.util as u\n"
        "spec = u.find_spec('kernels')\n"
        "print(spec.origin if spec else 'absent')"
    ).strip()
    assert origin == "absent" or not Path(origin).resolve().is_relative_to(ROOT / "kernels")


def test_laptop_houses_import_without_the_gpu_extra():
    names = module_names(*LAPTOP_HOUSES)
    run_python(f"import importlib\nfor name in {names!r}: importlib.import_module(name)", blocked=GPU_LIBRARIES)


def test_kernels_import_without_the_planning_libraries():
    names = [name for name in module_names("kernels") if not name.endswith(".commands")]
    run_python(f"import importlib\nfor name in {names!r}: importlib.import_module(name)", blocked=PLAN_LIBRARIES)


def test_help_needs_neither_extra_nor_houses():
    printed = run_python(
        "sys.argv = ['sparsering', '--help']\nfrom sparsering.cli import main\n"
        "try: main()\nexcept SystemExit as end: print('exit', end.code)\n"
        "print([m for m in sys.modules if m.startswith('sparsering.') and m.count('.') > 1])",
        blocked=GPU_LIBRARIES | PLAN_LIBRARIES,
    )
    assert "exit 0" in printed
    assert printed.splitlines()[-1] == "['sparsering.traces.errors']"


def test_every_public_name_resolves():
    import sparsering

    public = [name for name in dir(sparsering) if not name.startswith("_")]
    assert {"VerticalSlash", "InputError", "kernels"} <= set(public)
    assert [name for name in public if getattr(sparsering, name, None) is None] == []


def test_packages_are_listed_as_on_disk():
    listed = set(_setuptools()["packages"])
    on_disk = {".".join([PACKAGE, *path.parent.relative_to(ROOT).parts]) for path in sources(*MAY_IMPORT)}
    assert listed == on_disk | {PACKAGE}
    missing = [name for name in listed if not (_folder(name) / "__init__.py").is_file()]
    assert missing == []


def test_data_files_are_packaged():
    globs = {_folder(name): patterns for name, patterns in _setuptools()["package-data"].items()}
    unlisted = [
        relative(path) for house in MAY_IMPORT for path in _data_files(ROOT / house) if not _covered(path, globs)
    ]
    assert unlisted == []


def _setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def _data_files(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}]
    return [path for path in files if "__pycache__" not in path.parts]


def _covered(path: Path, globs: dict[Path, list[str]]) -> bool:
    return any(
        path.is_relative_to(folder) and fnmatch.fnmatch(path.relative_to(folder).as_posix(), pattern)
        for folder, patterns in globs.items()
        for pattern in patterns
    )
