"""Checkpoints of a training run: written aside, digested, renamed; verified whole before anything in them is believed.

torch's distributed checkpoint (DCP) writes one file per rank and a pickled index, and reads a flipped bit without a
word. So every file's SHA-256 stands in a manifest, which is written last, and loading compares all of them before DCP
sees any. This protects from accidents, not from someone who rewrites the manifest too: load only what you trust.

All ranks must see the same folder.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.nn import Module

from ...traces.errors import InputError, shown
from ...traces.files import read_sealed, sealed, sha256_of_file, sync_folder, write_json
from ..comm.mesh import Mesh
from ..comm.reuse import common_group
from .config import CheckpointSection
from .writers.writer import NotWritten

CHECKPOINT_SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PARTIAL = ".partial"
MAX_TOLD_RANKS = 4
MAX_MANIFEST_BYTES = 16 << 20
MAX_MANIFEST_VALUES = 1 << 20
_FOLDER = re.compile(r"^step-[0-9]{8}$")
_FILE = re.compile(r"^(\.metadata|__[0-9]+_[0-9]+\.distcp)$")
_SHA256 = re.compile("[0-9a-f]{64}")
_made = itertools.count(1)  # all ranks make theirs in the same order


class Checkpointer:
    """Saves and loads the state of model and optimizer of all ranks of `mesh`. Making it is collective.

    facts: JSON values that say which run this is; they stand in the manifest.
    """

    def __init__(self, section: CheckpointSection, mesh: Mesh, *, facts: dict[str, Any]) -> None:
        self.section, self._folder, self._mesh, self._facts = section, section.folder, mesh, facts
        self._topic = f"checkpoints {next(_made)}"
        self._group = common_group(mesh, "checkpoints", backend="gloo")  # its own: it works beside training
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if mesh.rank == 0:
            section.folder.mkdir(parents=True, exist_ok=True)
            for left in section.folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left)
        dist.barrier(self._group)

    def save(self, step: int, model: Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the state after `step` optimizer steps. Collective. Waits for the previous save, not for this one."""
        self.finish()
        partial = self._folder / f"step-{step:08d}{PARTIAL}"
        with self._naming_what_failed(step):
            state, writer = _state(model, optimizer), _Writer(partial)
            if self.section.asynchronous:
                pending = async_save(state, storage_writer=writer, process_group=self._group)
                self._thread = threading.Thread(target=self._complete, args=(partial, step, pending), daemon=True)
                self._thread.start()
                return
            save(state, storage_writer=writer, process_group=self._group)
            self._seal(partial, step)

    def finish(self) -> None:
        """Wait until what was saved is complete on this rank; raises what went wrong, NotWritten for a full disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, as rank 0 sees it. Collective."""
        found = newest_checkpoint(self._folder) if self._mesh.rank == 0 else None
        name = self._mesh.broadcast(f"{self._topic} newest", found and found.name)
        return name and self._folder / name

    def load(self, path: Path, model: Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Verify a checkpoint's files, load its state in place and return its manifest. Collective.

        Raises InputError on every rank when any file is not what the manifest says.
        """
        manifest = read_checkpoint_manifest(path)
        names = sorted(manifest["files"])
        problem = _first_problem(path, manifest, names[self._mesh.rank :: self._mesh.world_size])
        problems = self._mesh.collect(f"{self._topic} verified {path.name}", problem)
        found = next((text for text in problems or [] if text), None)
        if (told := self._mesh.broadcast(f"{self._topic} problem {path.name}", found)) is not None:
            raise InputError(told)
        state = _state(model, optimizer)
        load(state, checkpoint_id=path, process_group=self._group)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return manifest

    def _complete(self, partial: Path, step: int, pending: Any) -> None:
        try:
            with self._naming_what_failed(step):
                pending.result()
                self._seal(partial, step)
        except BaseException as error:  # raised again by `finish`, in the training thread
            self._error = error

    @contextmanager
    def _naming_what_failed(self, step: int) -> Iterator[None]:
        """Raise NotWritten, which names the rank and its reason in one line, where a checkpoint cannot be written.

        torch tells every rank what failed on any, as pages of tracebacks in what is no Exception.
        """
        try:
            yield
        except CheckpointException as error:
            reasons = {rank: _said(failure) for rank, (failure, _) in error.failures.items()}
            raise self._not_written(step, reasons) from error
        except (OSError, InputError) as error:  # ours say which file
            raise self._not_written(step, {self._mesh.rank: _said(error)}) from error

    def _not_written(self, step: int, reasons: dict[int, str]) -> NotWritten:
        world = self._mesh.world_size
        told = [f"rank {rank} of {world}: {reason}" for rank, reason in sorted(reasons.items())]
        more = f" (and {len(told) - MAX_TOLD_RANKS} more ranks)" if len(told) > MAX_TOLD_RANKS else ""
        return NotWritten(
            f"step {step}: its checkpoint could not be written to {self._folder}: "
            f"{'; '.join(told[:MAX_TOLD_RANKS])}{more}; what was complete before is whole"
        )

    def _seal(self, partial: Path, step: int) -> None:
        """Digest this rank's files; on rank 0 wait for all digests, write the manifest and rename the folder."""
        own = list(partial.glob(f"__{self._mesh.rank}_*.distcp"))
        own += [partial / ".metadata"] if self._mesh.rank == 0 else []
        digests = {path.name: {"sha256": sha256_of_file(path), "bytes": path.stat().st_size} for path in own}
        everyone = self._mesh.collect(f"{self._topic} digests {partial.name}", digests)  # RankLost where one is gone
        if everyone is None:
            return
        files = {name: stated for one in everyone for name, stated in one.items()}
        raw = {
            "schema_version": CHECKPOINT_SCHEMA_VERSION, "kind": "sparsering-checkpoint", "step": step,
            "facts": self._facts, "files": files,
        }  # fmt: skip
        write_json(partial / MANIFEST_NAME, sealed(raw))
        final = partial.with_suffix("")
        if final.exists():  # the same step of an earlier run that was not resumed
            remove_checkpoint(final)
        os.replace(partial, final)
        sync_folder(self._folder)
        for old in complete_checkpoints(self._folder)[: -self.section.keep_last]:
            remove_checkpoint(old)


class _Writer(FileSystemWriter):
    """torch's writer. What it raises is what came first: of a full disk it would say that an archive has a gap."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Write this rank's part."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _first_of(error) from error


def _first_of(error: BaseException) -> BaseException:
    """Return the error of the operating system that others followed from, or the error itself."""
    earlier: BaseException | None = error
    while earlier is not None and not isinstance(earlier, OSError):
        earlier = earlier.__cause__ or earlier.__context__
    return earlier or error


def _said(error: BaseException) -> str:
    """Return an error in one line: an operating system's as it says it, others with their kind."""
    told = str(error).partition("\n")[0]
    return told if isinstance(error, OSError | InputError) and told else f"{type(error).__name__}: {told}".rstrip(": ")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _FOLDER.match(p.name) and (p / MANIFEST_NAME).is_file())


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, which is whole or not there at any moment; the next run removes what a killed one left."""
    aside = path.with_name(f"{path.name}.old{PARTIAL}")
    os.replace(path, aside)
    shutil.rmtree(aside)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder."""
    return next(reversed(complete_checkpoints(folder)), None)


def read_checkpoint_manifest(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest: version, digest, file names; InputError in one line."""
    source = path / MANIFEST_NAME
    raw = read_sealed(source, newest_schema=CHECKPOINT_SCHEMA_VERSION, max_bytes=MAX_MANIFEST_BYTES,
                      max_values=MAX_MANIFEST_VALUES)  # fmt: skip
    step, facts, files = (raw.get(name) for name in ("step", "facts", "files"))
    if raw.get("kind") != "sparsering-checkpoint" or not isinstance(facts, dict) or not isinstance(files, dict):
        raise InputError("is no checkpoint's manifest", source=source)
    if type(step) is not int or step < 0:
        raise InputError(f"must be a whole number from 0, not {shown(step)}", source=source, field="step")
    for name, stated in files.items():
        if not _FILE.fullmatch(name):
            raise InputError(f"{shown(name)} is no file of a checkpoint", source=source, field="files")
        digest = stated.get("sha256") if isinstance(stated, dict) else None
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise InputError(f"has no SHA-256: {shown(stated)}", source=source, field=f"files.{name}")
    return raw


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its digest and return the manifest; InputError names what differs."""
    manifest = read_checkpoint_manifest(path)
    if problem := _first_problem(path, manifest, sorted(manifest["files"])):
        raise InputError(problem)
    return manifest


def _first_problem(path: Path, manifest: dict[str, Any], names: list[str]) -> str | None:
    present = {entry.name for entry in path.iterdir()} - {MANIFEST_NAME}
    if unlisted := sorted(present - set(manifest["files"])):
        return f"{path / unlisted[0]}: is not listed in the manifest"
    for name in names:
        wanted = manifest["files"][name]
        try:
            actual = sha256_of_file(path / name)
        except InputError as error:
            return str(error)
        if actual != wanted["sha256"]:
            return f"{path / name}: sha256: is {actual}, the manifest says {wanted['sha256']}: altered"
    return None


def _state(model: Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
