"""Folders that are there whole or not at all: written beside their place, and moved there in the end."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from ..files import sync_folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place when the block ends well; else nothing is left of it.

    What processes left there that were killed is removed: a lock tells it from what somebody writes just now. Raises
    InputError where `folder` holds anything, or nothing can be written beside it.
    """
    require_empty(folder)
    try:
        working, handle = working_folder(folder)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    try:
        yield working
        working.chmod(0o755)
        require_empty(folder)  # meanwhile somebody may have written there
        os.replace(working, folder)  # an empty folder may be replaced by another
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    finally:
        os.close(handle)
        shutil.rmtree(working, ignore_errors=True)


@contextmanager
def whole_folders(*folders: Path) -> Iterator[list[Path]]:
    """Yield an empty folder for each, as `whole_folder` does; they take their places one after the other.

    Where one cannot, those that did are removed. Only a process that is killed in between leaves some without others.
    Raises InputError as `whole_folder` does, and where one of the folders is another or lies in it.
    """
    first, *others = folders
    places = [folder.absolute() for folder in others]
    if any(first.absolute() in (place, *place.parents) or place in first.absolute().parents for place in places):
        raise InputError("is another folder that is to be written, lies in it or holds it", source=first)
    moved = list[Path]()
    try:
        with whole_folder(first) as working, ExitStack() as stack:
            rest = stack.enter_context(whole_folders(*others)) if others else []
            yield [working, *rest]
            stack.close()
            moved += others
    except BaseException:
        for folder in moved:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def require_empty(folder: Path) -> None:
    """Raise InputError unless the path is free or an empty folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError("exists and is no folder", source=folder)
    if folder.is_dir() and (found := sorted(entry.name for entry in folder.iterdir())):
        raise InputError(f"is not empty: it holds {found[0]!r}", source=folder)


def begun_folder(folder: Path, fill: Callable[[Path], None]) -> int | None:
    """Make `folder` with what `fill` writes into it: from its first moment on it holds that, and is locked.

    Returns the handle that holds the lock, None where something is at `folder`. Raises InputError when it cannot be
    written; then, and when `fill` raises, nothing is left.
    """
    if folder.is_symlink() or folder.exists():
        return None
    try:
        working, handle = working_folder(folder, mode=0o777)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    try:
        fill(working)
        os.rename(working, folder)
        sync_folder(folder.parent)
    except BaseException as error:  # also Ctrl-C
        for place in (working, folder):
            with suppress(OSError):
                if os.path.samestat(place.stat(), os.fstat(handle)):
                    shutil.rmtree(place, ignore_errors=True)
        os.close(handle)
        if not isinstance(error, OSError):
            raise
        if folder.is_dir() and any(folder.iterdir()):  # somebody else was faster
            return None
        raise InputError(f"cannot be written: {error.strerror}", source=folder) from error
    return handle


def working_folder(folder: Path, *, mode: int = 0o700) -> tuple[Path, int]:
    """Make an empty folder beside `folder`; return it with the handle that holds its lock. Raises OSError.

    What processes left there that were killed is removed first: the lock tells it from what somebody writes just now.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_left_folders(folder)
    while True:
        working = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        working.mkdir(mode)
        handle = None
        try:
            handle = os.open(working, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if working.exists():
                return working, handle
            os.close(handle)
        except FileNotFoundError:
            pass  # somebody took it for left before it was locked
        except BaseException:  # also Ctrl-C
            if handle is not None:
                os.close(handle)
            working.rmdir()
            raise


def remove_left_folders(folder: Path) -> None:
    """Remove what killed processes left beside `folder` while they wrote it; what is locked is in use."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        if not left.is_dir() or left.is_symlink():
            continue
        try:
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # it was somebody's, and has its place now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)
