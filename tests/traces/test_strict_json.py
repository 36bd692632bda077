"""JSON of unknown hands: bounded before it costs memory, strict in numbers, keys and text, and files that are none."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsering.traces.errors import InputError, shown
from sparsering.traces.files import MAX_JSON_BYTES, read_bytes, read_json, sha256_of_file
from sparsering.traces.strict_json import MAX_DEPTH, MAX_VALUES, parse_json


def refusal(data: bytes, **options: bool) -> str:
    with pytest.raises(InputError) as caught:
        parse_json(data, "f.json", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": [1, 1e999]}', "f.json: a.1: '1e999' is no finite number"),
        ("[-1e999]", "f.json: 0: '-1e999' is no finite number"),
        ('{"a": NaN}', "f.json: a: NaN is not a number"),
        ("-Infinity", "f.json: -Infinity is not a number"),
        ("9223372036854775808", "f.json: '9223372036854775808' is no whole number of 64 bits"),
        ("9" * 5000, "is no whole number of 64 bits"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "f.json: a: the key 'b' is given twice"),
        ('["\\u001b[31m"]', "f.json: 0: '\\x1b[31m' holds U+001B, which is no text"),
        ('{"\\u0007": 1}', "f.json: '\\x07' holds U+0007"),
        ('["\x9b31m"]', "holds U+009B"),
        ('["\u202e"]', "holds U+202E"),
        ('["\\ud800"]', "holds U+D800"),
        ('["\x1b"]', "is not valid JSON"),
        ('{"a": 1', "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_what_cannot_be_taken_at_its_word_is_refused(text: str, problem: str) -> None:
    assert problem in refusal(text.encode())


def test_bytes_that_are_no_text_are_refused() -> None:
    assert "no UTF-8" in refusal(b'"\xff"')
    assert "is not valid JSON" in refusal('"utf-16"'.encode("utf-16"))


def test_good_text_is_read() -> None:
    text = '{"a": [0, -9223372036854775808, 1.5e-7, true, null, "ē\\n\\t😀 \\"[{\\\\"], "b": {}}'
    assert parse_json(text.encode(), "f.json") == {"a": [0, -(1 << 63), 1.5e-7, True, None, 'ē\n\t😀 "[{\\'], "b": {}}


@pytest.mark.parametrize("signs", ["[]", '{"a":}'])
def test_nesting_is_bounded_before_it_is_parsed(signs: str) -> None:
    opening, closing = signs[:-1], signs[-1]
    deepest = opening * (MAX_DEPTH - 1) + '"[[[[\\"{{{\\\\"' + closing * (MAX_DEPTH - 1)
    parse_json(b"[" + deepest.encode() + b',"' + b"[" * 500 + b'"]', "f.json")  # those within a string do not count
    assert f"nested more than {MAX_DEPTH} deep" in refusal((opening * (MAX_DEPTH + 1) + "1").encode())
    assert "deep" in refusal(b"[" * 1_000_000)


def test_values_are_counted_before_they_are_made() -> None:
    tracemalloc.start()
    told = refusal(b"[" + b"[]," * MAX_VALUES + b"[]]")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"at most {MAX_VALUES} are read" in told
    assert peak_bytes < 100 << 20


def test_a_small_file_that_decompresses_to_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(b" " * (MAX_JSON_BYTES + 1)))
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match=f"decompresses to more than {MAX_JSON_BYTES} bytes"):
        read_json(path)
    path.write_bytes(gzip.compress(b"[]") + b"x")
    with pytest.raises(InputError, match="1 bytes after its end"):
        read_json(path)


def test_compressed_files_are_known_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(gzip.compress(b"[1]"))
    assert read_json(tmp_path / "t.json") == [1]


def test_numbers_under_a_digest_are_written_in_one_way() -> None:
    good = b"[0.30000000000000004, 1e-05, -0.0, 12, 1e+16]"
    assert parse_json(good, "f.json", exact=True) == [0.30000000000000004, 1e-5, 0.0, 12, 1e16]
    for other in (b"0.30000000000000005", b"1E-05", b"-0", b"1.50", b"1e16"):
        assert "altered" in refusal(b"[" + other + b"]", exact=True)
        parse_json(other, "f.json")


WORST = {
    "objects": b'[' + b'{"a":1},' * (MAX_VALUES // 3 - 1) + b"1]",
    "lists": b"[" + b"[]," * (MAX_VALUES // 2 - 1) + b"1]",
    "wide text": b'["' + "😀".encode() * (MAX_JSON_BYTES // 16 - 2) + b'"]',
    "long text": b'["' + b"x" * (MAX_JSON_BYTES - 4) + b'"]',
}  # fmt: skip
READ_WITHIN_1_GB = """
import resource, sys
from pathlib import Path
from sparsering.traces.files import read_json
resource.setrlimit(resource.RLIMIT_DATA, (1000 << 20, 1000 << 20))
read_json(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORST))
def test_no_file_that_is_read_takes_a_gigabyte(tmp_path: Path, name: str) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(WORST[name])
    done = subprocess.run([sys.executable, "-c", READ_WITHIN_1_GB, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's name may be short only
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _socket, _device], ids=lambda make: make.__name__)
@pytest.mark.parametrize("read", [read_bytes, read_json, sha256_of_file], ids=lambda read: read.__name__)
def test_only_regular_files_are_read(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    make(tmp_path / "f.json")
    with pytest.raises(InputError, match=r"f\.json: cannot be read: is no regular file"):
        read(tmp_path / "f.json")


def test_a_folder_and_a_name_that_is_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_bytes(tmp_path)
    with pytest.raises(InputError, match="cannot be read: embedded null"):
        read_bytes(Path("a\0b"))
    (tmp_path / "f.json").write_text("[1]")
    (tmp_path / "link.json").symlink_to(tmp_path / "f.json")
    assert read_json(tmp_path / "link.json") == [1]


def test_messages_hold_nothing_that_a_terminal_obeys() -> None:
    told = str(InputError("is \x1b[31mred\x9b\u202e\ud800", source="a\x07\nb", field="\x1b]0;x"))
    assert told.isprintable() and told.isascii()
    assert told == "a\\x07\\nb: \\x1b]0;x: is \\x1b[31mred\\x9b\\u202e\\ud800"


def test_large_values_are_not_written_out_to_be_cut() -> None:
    nested: list[object] = []
    for _ in range(20):
        nested = [nested] * 10  # ten to the power of twenty
    assert shown(nested).endswith("...") and len(shown(nested)) <= 60
    assert shown({"a": [1, "x"], "b": None}) == "{'a': [1, 'x'], 'b': None}"
