"""The folder that mistakes are made in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistakes import write_workspace


@pytest.fixture(scope="session")
def written_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files and bad ones, made once."""
    folder = tmp_path_factory.mktemp("mistakes")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_workspace(folder)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def workspace(written_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same folder as the current one; no mistake may change it."""
    monkeypatch.chdir(written_workspace)
    yield written_workspace
