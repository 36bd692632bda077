"""Temporary files and folders: what is in use stays, what killed processes left goes, and two who begin do not meet."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from sparsering.traces.dataset.whole_folder import begun_folder, whole_folder
from sparsering.traces.errors import InputError
from sparsering.traces.files import write_atomically


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def test_temporary_files_in_use_stay_and_those_left_go(tmp_path: Path) -> None:
    target, used, left, other = (tmp_path / name for name in ("x", ".x.aaaa.partial", ".x.bbbb.partial", ".y.partial"))
    for path in (used, left, other):
        path.write_bytes(b"half")
    handle = _locked(used)
    write_atomically(target, b"whole")
    assert target.read_bytes() == b"whole"
    assert {path.name for path in tmp_path.iterdir()} == {"x", used.name, other.name}
    os.close(handle)
    write_atomically(target, b"again")
    assert {path.name for path in tmp_path.iterdir()} == {"x", other.name}


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"years of work")
    (tmp_path / ".x.aaaa.partial").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "x", b"whole")
    assert (tmp_path / "precious").read_bytes() == b"years of work"


def test_a_begun_folder_is_locked_and_holds_its_first_file_from_the_first_moment_on(tmp_path: Path) -> None:
    folder, seen = tmp_path / "out", []

    def fill(working: Path) -> None:
        seen.append(folder.exists())
        write_atomically(working / "first", b"1")

    handle = begun_folder(folder, fill)
    assert handle is not None and seen == [False]
    assert [path.name for path in folder.iterdir()] == ["first"]
    with pytest.raises(BlockingIOError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert begun_folder(folder, fill) is None  # it is there
    os.close(handle)


def test_the_faster_of_two_who_begin_keeps_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def fill(working: Path) -> None:
        folder.mkdir()  # the other one, meanwhile
        (folder / "other").write_bytes(b"2")

    assert begun_folder(folder, fill) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_nothing_is_left_where_the_first_file_cannot_be_written(tmp_path: Path) -> None:
    def fill(working: Path) -> None:
        (working / "nowhere" / "x").write_bytes(b"")

    with pytest.raises(InputError, match="cannot be written: No such file"):
        begun_folder(tmp_path / "out", fill)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_stays_and_one_that_was_left_goes(tmp_path: Path) -> None:
    for name in ("used", "left"):
        (tmp_path / f".out.{name}.partial").mkdir()
    handle = _locked(tmp_path / ".out.used.partial")
    with whole_folder(tmp_path / "out") as working:
        (working / "file").write_bytes(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.used.partial"}
    os.close(handle)
