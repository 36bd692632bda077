"""The architecture that the folder list shows, held: sizes of files and folders, imports without circles, few floors.

A *part* of a house is a folder in it, or a file that lies directly in the house. Parts import each other in one
direction. A part's floor is one more than the highest floor that it imports from; files within a folder likewise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from source_files import MAY_IMPORT, PACKAGE, ROOT, imported_modules, relative, sources

MAX_FILE_LINES = 350
MAX_FOLDER_FILES = 15
MAX_FLOORS = 6
MAX_PARAMETERS = 10
MAX_KERNEL_PARAMETERS = 24

HOUSES = sorted(MAY_IMPORT)
WRITTEN = ("benchmarks", "docs", "examples", "tests", *HOUSES)
Graph = Mapping[str, set[str]]


def _file_graph(house: str) -> dict[str, set[str]]:
    """Return for each file of a house ("planner/plan.py") those of its files that it imports."""
    files = {relative(path): path for path in sources(house)}
    modules = {name.removesuffix(".py").replace("/", "."): name for name in files}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        absolute = (module for _, module in imported_modules(path.read_text(), name))
        inside = (module.removeprefix(f"{PACKAGE}.") for module in absolute if module.startswith(f"{PACKAGE}.{house}."))
        found = {modules.get(module) or modules.get(module.rpartition(".")[0]) for module in inside}
        graph[name] = {target for target in found if target} - {name}
    return graph


def _part(name: str) -> str:
    """Return the part that a file belongs to: "planner/cost" of planner/cost/links.py, planner/plan.py is its own."""
    house, first, *rest = name.split("/")
    return f"{house}/{first}" if rest else name


def _parts_graph(files: Graph) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {_part(name): set() for name in files}
    for name, targets in files.items():
        graph[_part(name)] |= {_part(target) for target in targets} - {_part(name)}
    return graph


def _folder_graphs(files: Graph) -> Iterator[tuple[str, dict[str, set[str]]]]:
    for folder in sorted({str(Path(name).parent) for name in files}):
        inside = {name for name in files if str(Path(name).parent) == folder}
        yield folder, {name: files[name] & inside for name in inside}


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of every node, from 1; ValueError names a circle."""
    found: dict[str, int] = {}

    def floor(node: str, above: tuple[str, ...]) -> int:
        if node in above:
            raise ValueError(" -> ".join([*above[above.index(node) :], node]))
        if node not in found:
            found[node] = 1 + max((floor(target, (*above, node)) for target in graph[node]), default=0)
        return found[node]

    for node in graph:
        floor(node, ())
    return found


def _parameters(source: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (name, number of parameters without self, whether it is a Triton kernel) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(one.arg not in ("self", "cls") for one in given)
            yield node.name, count, any("jit" in ast.unparse(one) for one in node.decorator_list)


def _is_verb(path: Path) -> bool:
    """Whether a file holds verbs: their options are parameters of one function, as typer wants them."""
    return path.name in ("command.py", "commands.py") or path.name.endswith("_command.py")


@pytest.mark.parametrize("path", [ROOT / "cli.py", ROOT / "__init__.py", *sources(*WRITTEN)], ids=relative)
def test_files_are_short(path: Path):
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES


@pytest.mark.parametrize("top", WRITTEN)
def test_folders_are_small(top: str):
    folders = {path.parent for path in sources(top)}
    sizes = {relative(folder): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: size for name, size in sizes.items() if size > MAX_FOLDER_FILES} == {}


@pytest.mark.parametrize("house", HOUSES)
def test_parts_of_a_house_import_in_one_direction_and_on_few_floors(house: str):
    assert max(floors(_parts_graph(_file_graph(house))).values()) <= MAX_FLOORS


@pytest.mark.parametrize("house", HOUSES)
def test_files_of_a_folder_import_in_one_direction_and_on_few_floors(house: str):
    highest = {folder: max(floors(graph).values()) for folder, graph in _folder_graphs(_file_graph(house))}
    assert {folder: floor for folder, floor in highest.items() if floor > MAX_FLOORS} == {}


def test_a_circle_is_seen():
    with pytest.raises(ValueError, match="a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})
    assert floors({"a": {"b"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


@pytest.mark.parametrize("path", sources(*HOUSES, "benchmarks"), ids=relative)
def test_functions_take_few_parameters(path: Path):
    limits = {True: MAX_KERNEL_PARAMETERS, False: MAX_PARAMETERS}
    counted = [one for one in _parameters(path.read_text()) if not _is_verb(path) or one[2]]
    assert [(name, count) for name, count, is_kernel in counted if count > limits[is_kernel]] == []


@pytest.mark.parametrize("house", HOUSES)
def test_tests_lie_in_folders_that_mirror_the_house(house: str):
    folders = {relative(path.parent) for path in (ROOT / "tests" / house).rglob("test_*.py")}
    assert folders
    missing = {folder for folder in folders if not (ROOT / folder.removeprefix("tests/")).is_dir()}
    assert missing == set()
