"""Reading and writing files so that nothing is lost and nothing corrupt is believed.

Every file that this package writes goes through `write_atomically`: a temporary name beside the target, fsync,
rename, fsync of the folder. Digests are SHA-256 in lower-case hexadecimal.

Every file that is read goes through `open_regular`: a named pipe, a device or a folder is refused and not waited for.
JSON is parsed by `strict_json` within stated limits.
"""

from __future__ import annotations

import fcntl
import glob
import gzip
import hashlib
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import InputError, shown
from .strict_json import MAX_VALUES, parse_json

MAX_JSON_BYTES = 128 << 20  # also of what a compressed file decompresses to
GZIP_MAGIC = b"\x1f\x8b"
NON_ASCII_SHARE = 4  # text beyond ASCII may take four bytes of memory for each of its characters


def sha256_of_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes in hexadecimal; InputError when it cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", source=path) from error


def canonical_json(value: Any) -> bytes:
    """Return sorted-key compact UTF-8 JSON, the form that digests are taken of. NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, fsync it and rename it into place.

    A reader sees the old file or the whole new one, also after a crash. Missing folders are made, and temporary files
    of processes that were killed while they wrote to this path are removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path)
        handle, temporary = _temporary_beside(path)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", source=path) from error
    try:
        with os.fdopen(handle, "wb") as file:  # closed, and so unlocked, only when it has its name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException as error:  # also Ctrl-C: nothing is left beside the target
        Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(f"cannot be written: {error.strerror}", source=path) from error
    sync_folder(path.parent)


def _temporary_beside(path: Path) -> tuple[int, str]:
    """Make a temporary file; return the handle that holds its lock, which says that it is in use, and its name."""
    while True:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with suppress(OSError):  # no locks there: then nothing is taken for left
                fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException:  # Ctrl-C
            os.close(handle)
            os.unlink(temporary)
            raise
        if os.path.exists(temporary):
            return handle, temporary
        os.close(handle)  # somebody took it for left before it was locked


def remove_partials(path: Path) -> None:
    """Remove the temporary files of `write_atomically(path)` that processes left which were killed while they wrote.

    What is locked is in use and stays; so does what may not be opened.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # no folder opens so
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)
            finally:
                os.close(handle)


def sync_folder(folder: Path) -> None:
    """Have the system write down which files a folder holds, so that a rename in it outlives a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; a name ending in `.gz` is compressed reproducibly (no time stamp)."""
    data = json.dumps(value, indent=1, sort_keys=False, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    write_atomically(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def require_output(path: Path, *, kind: str, key: str) -> None:
    """Refuse, before any work, an output in the place of something else: InputError names it.

    kind, key: what the output is, and a key of its JSON. An older one of the same kind may be replaced, and so may an
    empty file; a folder, a device, or a file of another kind may not.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"cannot be written: {folder.name} is no folder", source=path)
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    if not path.is_file():
        raise InputError(f"cannot be written: is {'a folder' if path.is_dir() else 'no regular file'}", source=path)
    try:
        document = read_json(path)
    except InputError:
        document = None
    if not isinstance(document, dict) or key not in document:
        raise InputError(f"exists and is no {kind}: it is not overwritten", source=path)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. InputError when it is missing, unreadable, or no regular file, which might never end."""
    try:
        _require_regular(path, os.stat(path))  # before it is opened: opening alone makes some devices do something
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_regular(path, os.fstat(handle))  # what lies there now
            return open(handle, "rb")  # whoever called closes it
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=path) from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be read: {error}", source=path) from error  # a NUL in the name


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise InputError("cannot be read: Is a directory", source=path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("cannot be read: is no regular file (a pipe or a device: write it to a file first)",
                         source=path)  # fmt: skip


def read_bytes(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return a regular file's bytes; InputError when it is none, unreadable or larger than `max_bytes`."""
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise InputError(f"is {size_bytes} bytes; at most {max_bytes} are read", source=path)
        try:
            return file.read(size_bytes)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", source=path) from error


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_VALUES, exact: bool = False) -> Any:
    """Read JSON, compressed by gzip or not; InputError in one line when it is truncated, no JSON or beyond a limit.

    max_bytes: also of what it decompresses to; of text that is not all ASCII a quarter. max_values, exact: see
    `strict_json.parse_json`.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    if path.suffix == ".gz" or data.startswith(GZIP_MAGIC):
        data = _decompress(data, path, max_bytes)
    if len(data) > max_bytes // NON_ASCII_SHARE and not data.isascii():
        problem = f"is {len(data)} bytes, not all of them ASCII; at most {max_bytes // NON_ASCII_SHARE} are read"
        raise InputError(problem, source=path)
    return parse_json(data, path, max_values=max_values, exact=exact)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with `digest`, the SHA-256 of the rest, so that a flipped bit is seen when it is read."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return {**rest, "digest": sha256_of_bytes(canonical_json(rest))}


def read_sealed(
    path: Path, *, newest_schema: int, max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """Read a `sealed` JSON object: `schema_version` first, then the digest; InputError in one line."""
    raw = read_json(path, max_bytes=max_bytes, max_values=max_values, exact=True)
    if not isinstance(raw, dict):
        raise InputError("must be a JSON object", source=path)
    version, stated = raw.get("schema_version"), raw.get("digest")
    if type(version) is not int or version < 1:
        raise InputError(f"must be a whole number from 1, not {shown(version)}", source=path, field="schema_version")
    if version > newest_schema:
        raise InputError(f"is {version}; this version reads up to {newest_schema}", source=path, field="schema_version")
    actual = sealed(raw)["digest"]
    if stated != actual:
        raise InputError(f"is {shown(stated)}, the contents have {actual}: altered", source=path, field="digest")
    return raw


def _decompress(data: bytes, path: Path, max_bytes: int) -> bytes:
    decoder = zlib.decompressobj(wbits=31)
    try:
        plain = decoder.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InputError(f"is not a valid gzip file ({error})", source=path) from error
    if len(plain) > max_bytes:
        raise InputError(f"decompresses to more than {max_bytes} bytes", source=path)
    if not decoder.eof:
        raise InputError("is a truncated gzip file", source=path)
    if decoder.unused_data:
        raise InputError(f"has {len(decoder.unused_data)} bytes after its end as a gzip file", source=path)
    return plain
