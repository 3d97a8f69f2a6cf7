"""The checkpoint store: directories that are either whole or not there.

    step-00000100/           a committed checkpoint
      checkpoint.json        its manifest: what the run remembers, every file's size and SHA-256
      rank-00000.safetensors what the first worker saved, …
    latest                   name of the newest, written last
    .partial-step-…          being written, or left by a crash
    corrupt-step-…           set aside: its files do not match its checkpoint.json

Writing: partial directory → files → fsync → checkpoint.json → fsync → rename → pointer. A crash at
any point leaves the previous checkpoint as it was. It knows nothing about DeepSpeed or torch.

    store = FolderStore(run_dir / "checkpoints", keep=2)
    store.write(save, "rank-00000.safetensors", chunks)      # every worker, under the same name
    store.commit(save, manifest, best_step=0)                # the first, after all others
    store.names()                                            # newest first
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from jobs.training.manifest import MANIFEST_FILE, FileRecord, Manifest
from jobs.training.plain_files import require_plain

_log = logging.getLogger(__name__)

POINTER_FILE = "latest"
_PARTIAL = ".partial-"
_CORRUPT = "corrupt-"
_COMMITTED = "step-"

_NAME = re.compile(rf"{_COMMITTED}[0-9]{{8,18}}(-[0-9a-z]+)?")

Chunk = bytes | memoryview


class CheckpointStore(Protocol):
    """The checkpoints of one run. A `save` is a name from `name_of`, not yet committed."""

    def write(self, save: str, file: str, chunks: Iterable[Chunk]) -> None:
        """Store a file, whole and for good. Raises OSError or HeliostatError."""

    def commit(self, save: str, manifest: Manifest, *, best_step: int) -> None:
        """Make it the newest checkpoint, then delete what need not be kept; the checkpoint of
        `best_step` stays. If it raises, nothing is left of the save and nothing else has changed.
        """

    def abandon(self, save: str) -> None:
        """Remove what has been written; never raises."""

    def tidy(self) -> None:
        """Remove what crashes left."""

    def names(self) -> list[str]:
        """Names of the committed checkpoints, newest first."""

    def manifest(self, name: str) -> Manifest:
        """Raises OSError or ValueError if there is none, or not a whole one."""

    def fetch(self, name: str, files: Iterable[str], scratch: Path) -> Path:
        """A local directory that holds these files; `scratch` may be made to be it."""

    def set_aside(self, name: str) -> str:
        """Take a corrupt checkpoint out of the way; returns where it is now."""

    def remove(self, name: str) -> None: ...


def name_of(step: int, attempt: str = "") -> str:
    """Names sort as steps do, and attempts of the same step among themselves."""
    return f"{_COMMITTED}{step:08d}" + (f"-{attempt}" if attempt else "")


def step_of(name: str) -> int:
    return int(name.removeprefix(_COMMITTED).split("-")[0])


def is_name(text: str) -> bool:
    """Whether `name_of` gives such names; what else lies beside checkpoints is left alone."""
    return _NAME.fullmatch(text) is not None


def to_prune(names: Sequence[str], *, keep: int, best_step: int) -> list[str]:
    """What need not be kept of checkpoints that are given newest first: all but the newest `keep`
    and the best, and of one step all but the last attempt."""
    by_step: dict[int, str] = {}
    for name in names:
        by_step.setdefault(step_of(name), name)
    kept = set(sorted(by_step, reverse=True)[:keep]) | {best_step}
    return [name for name in names if step_of(name) not in kept or by_step[step_of(name)] != name]


class FolderStore:
    """See `CheckpointStore`; in a directory that all workers share."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self.root = root
        self._keep = keep

    def write(self, save: str, file: str, chunks: Iterable[Chunk]) -> None:
        partial = self._partial(save)
        partial.mkdir(parents=True, exist_ok=True)
        _write_synced(partial / file, chunks)

    def commit(self, save: str, manifest: Manifest, *, best_step: int) -> None:
        partial, final = self._partial(save), self.root / name_of(manifest.step)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _write_synced(partial / MANIFEST_FILE, [manifest.to_bytes()])
            _sync_directory(partial)
            if os.path.lexists(final):
                self.remove(final.name)
            partial.rename(final)
            _sync_directory(self.root)
        except OSError:
            self.abandon(save)
            raise
        self._point_to(final.name)
        for name in to_prune(self.names(), keep=self._keep, best_step=best_step):
            self.remove(name)

    def abandon(self, save: str) -> None:
        shutil.rmtree(self._partial(save), ignore_errors=True)

    def tidy(self) -> None:
        for leftover in self.root.glob(f"{_PARTIAL}*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def names(self) -> list[str]:
        names = (path.name for path in self.root.glob(f"{_COMMITTED}*"))
        return sorted(filter(is_name, names), reverse=True)

    def manifest(self, name: str) -> Manifest:
        path = self.root / name / MANIFEST_FILE
        require_plain(path)
        return Manifest.from_bytes(path.read_bytes())

    def fetch(self, name: str, files: Iterable[str], scratch: Path) -> Path:
        return self.root / name

    def set_aside(self, name: str) -> str:
        aside = _free_name(self.root / f"{_CORRUPT}{name}")
        (self.root / name).rename(aside)
        return str(aside)

    def remove(self, name: str) -> None:
        # Renamed first: what is half deleted must not be taken for corrupt.
        doomed = self.root / f"{_PARTIAL}removed-{name}-{uuid.uuid4().hex[:8]}"
        (self.root / name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _partial(self, save: str) -> Path:
        return self.root / f"{_PARTIAL}{save}"

    def _point_to(self, name: str) -> None:
        # Only a convenience for readers: `names` trusts what is there, so failing loses nothing.
        temporary = self.root / f"{_PARTIAL}{POINTER_FILE}"
        try:
            _write_synced(temporary, [f"{name}\n".encode()])
            temporary.replace(self.root / POINTER_FILE)
            _sync_directory(self.root)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            _log.warning("pointer to %s not written: %s", name, error)


def problem_of(path: Path, record: FileRecord) -> str:
    """What is wrong with a file, in words; empty if it is what was written."""
    try:
        require_plain(path)
        if path.stat().st_size != record.size_bytes:
            return f"{path.name} has the wrong size"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return f"{path.name} has changed"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return ""


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def _write_synced(path: Path, chunks: Iterable[Chunk]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
