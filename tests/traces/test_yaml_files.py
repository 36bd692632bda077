"""The YAML reader: numbers as YAML 1.2 has them, and one quick line for every file that cannot be believed."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsering.cli import app
from sparsering.planner.cost.cluster import MAX_CLUSTER_BYTES, PRESETS, load_cluster
from sparsering.runtime.train.config import MAX_CONFIG_BYTES, load_config
from sparsering.traces.errors import InputError
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from sparsering.traces.yaml_files import MAX_DEPTH, read_yaml

ROOT = Path(__file__).resolve().parents[2]
LADDER = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
# Small files that made tracebacks, gigabytes, or a silent choice -> what is said after the file's name; None: read.
HOSTILE: dict[str, tuple[str, str | None]] = {
    "aliases.yaml": (LADDER, "line 1: anchors and aliases are not read ('&a')"),
    "deep.yaml": ("[" * 20000, "line 1: is nested more than 50 deep"),
    "date.yaml": ("zz: 2001-13-45\n", None),
    "tag.yaml": ('nodes: !!int ""\n', "nodes: '' is no !!int (line 1)"),
    "digits.yaml": ("nodes: " + "9" * 5000, f"nodes: '{'9' * 56}... is no integer of 64 bits (line 1)"),
    "twice.yaml": ("nodes: 1\nnodes: 2\n", "nodes: is given twice (in line 1, again in line 2)"),
    "typo.yaml": ("gpu: {multiprocesors: 4}\n", None),
    "theta.yaml": ("model: {path: m, rope_parameters: {rope_type: yarn, factor: 4.0, rope_theta: 1.0e6}}\n", None),
}


def read(folder: Path, content: str | bytes) -> Any:
    path = folder / "f.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path, max_bytes=1 << 16)


def refusal(folder: Path, content: str | bytes) -> str:
    """Return what is said after the file's name; that it is one line is checked."""
    with pytest.raises(InputError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'f.yaml'}: ") and message.isprintable()
    return message.removeprefix(f"{folder / 'f.yaml'}: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.0e6", 1e6), ("1e6", 1e6), ("4.0e-4", 4e-4), ("312.0e+6", 3.12e8), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0),
        ("-1.5", -1.5), ("+.5e1", 5.0), ("-2e-3", -2e-3), ("1_000.5", 1000.5), ("!!float 3", 3.0), ("1.0", 1.0),
        ("0", 0), ("-7", -7), ("+7", 7), ("010", 10), ("0o17", 15), ("0xfF", 255), ("524_288", 524288),
        ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)), ('!!int "12"', 12),
        ("true", True), ("TRUE", True), ("False", False), ("null", None), ("~", None), ("", None), ("# nothing", None),
        ("2001-12-14", "2001-12-14"), ("2001-13-45", "2001-13-45"), ("12:30", "12:30"), ("1:30.5", "1:30.5"),
        ("yes", "yes"), ("off", "off"), ("n", "n"), ("1e", "1e"), ("e6", "e6"), ("1_", "1_"), ("0b1", "0b1"),
        ("1.2.3", "1.2.3"), ("'1e6'", "1e6"), ("!!str 1e6", "1e6"), ("=", "="), ("inf", "inf"), ("1 e6", "1 e6"),
    ],
)  # fmt: skip
def test_a_plain_word_is_what_the_core_schema_of_yaml_1_2_says(text: str, value: Any, tmp_path: Path) -> None:
    found = read(tmp_path, text)
    assert (type(found), found) == (type(value), value)
    assert read(tmp_path, f"a: [{text}]" if text[:1] not in ("", "#") else "a: [~]") == {"a": [value]}


def test_text_lists_and_mappings_in_every_style(tmp_path: Path) -> None:
    text = '\ufeff%YAML 1.2\n---\na:\n- {b: "\\u00e9\\n", c d: []}\n- !!map {}\nfolded: >-\n  one\n  two\n<<: {x: 1}\n'
    assert read(tmp_path, text) == {"a": [{"b": "é\n", "c d": []}, {}], "folded": "one two", "<<": {"x": 1}}


PRINTED = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | PRINTED,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PRINTED, inner, max_size=4),
    max_leaves=20,
)


@given(value=VALUES)
def test_json_says_the_same_in_yaml(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Python's own JSON is the other opinion: its numbers and texts are YAML 1.2 as well."""
    text = json.dumps(value, ensure_ascii=False)
    assert json.dumps(read(tmp_path_factory.getbasetemp(), text), ensure_ascii=False) == text


SCRAPS = st.sampled_from(
    [
        "a", "b: ", "- ", "[", "]", "{", "}", ", ", "\n", "\n  ", "!", "!!int ", "!!map ", "!<", "!e!x ", "&a ", "*a",
        "'", '"', "\\", "\\u", "d800", "\\UFFFFFFFF", "| ", ">-", "%YAML ", "1." + "9" * 5000, "%TAG ", "---", "...",
        "? ", "#", "~", "1e6", ".inf", "0x", "\t", "\x85", "\u2028", "\ufeff", "\0", "\r", "<<: ", "@", "`", "true",
    ]
)  # fmt: skip


@given(scraps=st.lists(SCRAPS, max_size=12), ahead=st.binary(max_size=2))
def test_whatever_a_file_holds_it_is_read_or_refused_in_a_line(
    scraps: list[str], ahead: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "scraps.yaml"
    path.write_bytes(ahead + "".join(scraps).encode())
    try:
        read_yaml(path, max_bytes=1 << 20)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: &x 2\n", "line 2: anchors and aliases are not read ('&x')"),
        ("a: 1\nb: *x\n", "line 2: anchors and aliases are not read ('*x')"),
        ("&x a: 1\n", "line 1: anchors and aliases are not read ('&x')"),
        ("a: {b: 1,\n c: 2,\n b: 3}\n", "a.b: is given twice (in line 1, again in line 3)"),
        ('a:\n- b: 1\n  "b": 2\n', "a.0.b: is given twice (in line 2, again in line 3)"),
        ("1: x\n", "line 1: a key must be text, not '1'"),
        ("a:\n  true: x\n", "a: a key must be text, not 'true' (line 2)"),
        ("a:\n  ? [b]\n  : c\n", "a: a key must be text, not a list or mapping (line 2)"),
        ("a: !!float x\n", "a: 'x' is no !!float (line 1)"),
        ("a: !!bool yes\n", "a: 'yes' is no !!bool (line 1)"),
        ("a: !!binary eA==\n", "a: the tag '!!binary' is not read here (line 1)"),
        ("a: !!timestamp 2001-12-14\n", "a: the tag '!!timestamp' is not read here (line 1)"),
        ("a: !!set {x}\n", "a: the tag '!!set' is not read here (line 1)"),
        ("a: !!int [1]\n", "a: the tag '!!int' is not read here (line 1)"),
        ("!!python/object/apply:os.system [x]\n", "line 1: the tag '!!python/object/apply:os.system' is not read here"),
        ("a: [0,\n 9223372036854775808]\n", "a.1: '9223372036854775808' is no integer of 64 bits (line 2)"),
        ("a: -9223372036854775809\n", "a: '-9223372036854775809' is no integer of 64 bits (line 1)"),
        ("a: 0x10000000000000000\n", "a: '0x10000000000000000' is no integer of 64 bits (line 1)"),
        ("a: 1e999\n", "a: '1e999' is no finite number (line 1)"),
        ("a: .NaN\n", "a: '.NaN' is no finite number (line 1)"),
        ("a: -.Inf\n", "a: '-.Inf' is no finite number (line 1)"),
        ('a: "x\\0"\n', "a: 'x\\x00' holds U+0000, which is no text (line 1)"),
        ('a: "\\ud800"\n', "a: '\\ud800' holds U+D800, which is no text (line 1)"),
        ('"\\ud800": 1\n', "line 1: '\\ud800' holds U+D800, which is no text"),
        ('"x\\ny": !!int z\n', "'x\\ny': 'z' is no !!int (line 1)"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "line 2: is not valid YAML (an escape or a version is out of range)"),
        ("%YAML 1." + "9" * 5000, "line 1: is not valid YAML (an escape or a version is out of range)"),
        ("a: 1\n\x07b: 2\n", "line 2: is not valid YAML (the character U+0007 is not allowed)"),
        (b"a: 1\nb: \xff\n", "line 2: is not UTF-8 (invalid start byte)"),
        ("a: 1\n".encode("utf-16"), "line 1: is not UTF-8 (invalid start byte)"),
        ("a: 1\nb: [1,\n", "line 3: is not valid YAML (while parsing a flow node, expected the node content, but "
                           "found '<stream end>')"),
        ("a: 1\n--- \nb: 2\n", "line 2: is not valid YAML (expected a single document in the stream, but found another "
                               "document)"),
        ("a: b: c\n", "line 1: is not valid YAML (mapping values are not allowed here)"),
        (f"a: !{'x' * 200}!b c\n", f"line 1: is not valid YAML (while parsing a node, found undefined tag handle "
                                  f"'!{'x' * 106}...)"),
        ("x" * 65537, "is 65537 bytes; at most 65536 are read"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named_with_its_place(content: str | bytes, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, content) == message


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_nesting_has_a_limit(pair: str, tmp_path: Path) -> None:
    inner = {"[]": ("[", "]"), "{}": ("{a: ", "}")}[pair]
    found = read(tmp_path, inner[0] * MAX_DEPTH + "1" + inner[1] * MAX_DEPTH)
    for _ in range(MAX_DEPTH):
        found = found[0] if pair == "[]" else found["a"]
    assert found == 1
    deeper = "\n" * 6 + inner[0] * (MAX_DEPTH + 1) + "1" + inner[1] * (MAX_DEPTH + 1)
    assert refusal(tmp_path, deeper) == "line 7: is nested more than 50 deep"
    assert len(read(tmp_path, "\n".join(f"k{number}: [[1], {{a: 1}}]" for number in range(200)))) == 200


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot be read: {problem}$"):
            read_yaml(path, max_bytes=1 << 16)


def test_hostile_files_take_neither_time_nor_memory(tmp_path: Path) -> None:
    names = write_hostile(tmp_path)
    code = (
        "import json, pathlib, sys, time, tracemalloc\n"
        "from sparsering.traces.yaml_files import read_yaml\n"
        "from sparsering.traces.errors import InputError\n"
        "def read(name):\n"
        "    try: read_yaml(pathlib.Path(name), max_bytes=1 << 20)\n"
        "    except InputError as error: return str(error)\n"
        "for name in sys.argv[1:]:\n"
        "    began = time.process_time()\n"
        "    said = read(name)\n"
        "    seconds = time.process_time() - began\n"
        "    tracemalloc.start()\n"
        "    read(name)\n"
        "    print(json.dumps([said, seconds, tracemalloc.get_traced_memory()[1]]))\n"
        "    tracemalloc.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = [None if said is None else f"{name}: {said}" for name, (_, said) in HOSTILE.items()]
    assert [said for said, _, _ in results] == wanted
    assert max(seconds for _, seconds, _ in results) < 1
    assert max(peak_bytes for _, _, peak_bytes in results) < 20e6


def write_hostile(folder: Path) -> list[str]:
    for name, (content, _) in HOSTILE.items():
        (folder / name).write_text(content)
    return list(HOSTILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the hostile files and a trace to plan for."""
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile(folder)
    write_synthetic_trace(folder / "trace", "dense", SyntheticSettings(seq_len_tokens=512, heads=2, block_size=64))
    return folder


def said_by(*arguments: str) -> str:
    """Run a command that must end with exit code 2; return its one line."""
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("sparsering: ") and result.stderr.count("\n") == 1
    return result.stderr.strip().removeprefix("sparsering: ")


OF_THEIR_KEYS = {
    "plan": {
        "date.yaml": "zz: unknown key (its value is '2001-13-45')",
        "typo.yaml": "gpu.multiprocesors: unknown key (its value is 4); did you mean 'multiprocessors'?",
        "theta.yaml": "model: unknown key (its value is "
                      "{'path': 'm', 'rope_parameters': {'rope_type': 'yarn', 'f...)",
    },
    "train": {
        "date.yaml": "zz: unknown key (its value is '2001-13-45')",
        "typo.yaml": "gpu: unknown key (its value is {'multiprocesors': 4})",
        "theta.yaml": "data: is missing",
    },
}  # fmt: skip


@pytest.mark.parametrize("verb", OF_THEIR_KEYS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_command_given_a_hostile_file_says_one_line(
    name: str, verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = ["train", name, "--dry-run"]
    if verb == "plan":
        arguments = ["plan", "--trace", "trace", "--cluster", name, "-o", "plan.json"]
    told = f"{name}: {HOSTILE[name][1] or OF_THEIR_KEYS[verb][name]}"
    said = said_by(*arguments)
    assert said == told or ("unknown key" in told and said.startswith(told + "; known here: "))
    assert not (folder / "plan.json").exists()


def test_numbers_of_a_configuration_are_numbers_where_no_type_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {path: m, rope_parameters: {rope_type: yarn, factor: 4, rope_theta: 1e6, beta_fast: 3.2e+1}}\n"
        "data: {folder: 2001-12-14}\nseq_len_tokens: 524_288\nsteps: 1\noptimizer: {learning_rate: 3e-4}\n"
    )
    config = load_config(path)
    wanted = {"rope_type": "yarn", "factor": 4, "rope_theta": 1e6, "beta_fast": 32.0}
    assert config.model.rope_parameters == wanted
    assert [type(value) for value in wanted.values()] == [str, int, float, float]
    assert config.model.rope_parameters is not None
    assert [type(value) for value in config.model.rope_parameters.values()] == [str, int, float, float]
    assert (config.seq_len_tokens, config.optimizer.learning_rate) == (524288, 3e-4)
    assert config.data.folder == tmp_path / "2001-12-14"


@pytest.mark.parametrize(("load", "most_bytes"), [(load_cluster, MAX_CLUSTER_BYTES), (load_config, MAX_CONFIG_BYTES)])
def test_files_larger_than_any_settings_are_not_parsed(
    load: Callable[[Path], object], most_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("[" + "1," * (most_bytes // 2) + "]")
    assert path.stat().st_size == most_bytes + 2
    with pytest.raises(InputError, match=rf"large\.yaml: is {most_bytes + 2} bytes; at most {most_bytes} are read"):
        load(path)


def test_presets_say_the_same_as_under_yaml_1_1() -> None:
    yaml = pytest.importorskip("yaml")
    for path in sorted(PRESETS.glob("*.yaml")):
        found = read_yaml(path, max_bytes=1 << 16)
        assert found == yaml.safe_load(path.read_text())
        assert math.isfinite(found["gpu"]["peak_flops_per_us"])


def test_nobody_else_parses_yaml() -> None:
    houses = ("traces", "planner", "simulator", "kernels", "runtime", "benchmarks")
    sources = [path for house in houses for path in (ROOT / house).rglob("*.py")] + list(ROOT.glob("*.py"))
    readers = [path for path in sources if re.search(r"^\s*(import|from)\s+yaml\b", path.read_text(), re.MULTILINE)]
    assert [path.relative_to(ROOT).as_posix() for path in readers] == ["traces/yaml_files.py"]
