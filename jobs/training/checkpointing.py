"""The checkpoint store: directories that are either whole or not there.

    step-00000100/           a committed checkpoint
      checkpoint.json        step, world size, what the run remembers, every file's SHA-256
      state/…                what DeepSpeed wrote
    latest                   name of the newest, written last
    .partial-step-…          being written, or left by a crash
    corrupt-step-…           set aside: its files do not match its checkpoint.json

Writing: partial directory → files → fsync → checkpoint.json → fsync → rename → pointer. A crash at
any point leaves the previous checkpoint as it was. It knows nothing about DeepSpeed or torch.

    partial = store.begin(step)
    ...                                  # every worker writes below partial
    store.commit(partial, step, world_size=2)
    store.newest(notify=print)           # verified; a corrupt one is set aside, the previous used
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

MANIFEST_FILE = "checkpoint.json"
STATE_DIR = "state"
POINTER_FILE = "latest"
_PARTIAL = ".partial-"
_CORRUPT = "corrupt-"
_COMMITTED = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A committed and verified checkpoint."""

    path: Path
    step: int
    """Steps done when it was written: training goes on with the step of this number."""
    world_size: int
    size_bytes: int
    memory: dict[str, Any]
    """What the run remembers, as it was given to `commit`."""

    @property
    def state_dir(self) -> Path:
        return self.path / STATE_DIR


class CheckpointStore:
    """The checkpoints of one run, under one directory."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self.root = root
        self._keep = keep

    def begin(self, step: int) -> Path:
        """A fresh partial directory; those that a crash left are removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        partial = self.root / f"{_PARTIAL}{_name(step)}"
        (partial / STATE_DIR).mkdir(parents=True)
        return partial

    def commit(
        self,
        partial: Path,
        step: int,
        *,
        world_size: int,
        memory: dict[str, Any] | None = None,
        best_step: int = 0,
    ) -> Checkpoint:
        """Make a partial directory the newest checkpoint, then delete what need not be kept; the
        checkpoint of `best_step` stays.

        Raises:
            OSError: say, a full disk; the partial directory is gone and nothing else has changed.
        """
        try:
            head = {"step": step, "world_size": world_size, "memory": memory or {}}
            size_bytes = _seal(partial, head)
            final = self.root / _name(step)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync_directory(self.root)
        except OSError:
            self.abandon(partial)
            raise
        self._point_to(final.name)
        self._prune(best_step)
        return Checkpoint(final, step, world_size, size_bytes, memory or {})

    def abandon(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)

    def newest(
        self, *, notify: Callable[[str], None], at_most: int | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint, of step `at_most` or earlier, whose files are what they were when
        it was written.

        A corrupt one is renamed out of the way and `notify` told, once.
        """
        paths = [
            path for path in self._committed() if at_most is None or path.name <= _name(at_most)
        ]
        found = (self._open(path, notify) for path in reversed(paths))
        return next((checkpoint for checkpoint in found if checkpoint is not None), None)

    def at(self, step: int, *, notify: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint of one step, under the same conditions."""
        path = self.root / _name(step)
        return self._open(path, notify) if path.is_dir() else None

    def _open(self, path: Path, notify: Callable[[str], None]) -> Checkpoint | None:
        problem, checkpoint = _verify(path)
        if checkpoint is None:
            aside = _free_name(self.root / f"{_CORRUPT}{path.name}")
            path.rename(aside)
            notify(f"checkpoint {path.name} is corrupt ({problem}); set aside as {aside}")
        return checkpoint

    def _committed(self) -> list[Path]:
        return sorted(self.root.glob(f"{_COMMITTED}*"))

    def _remove_partial(self) -> None:
        for leftover in self.root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _point_to(self, name: str) -> None:
        # Only a convenience for readers: `newest` trusts digests, so failing here loses nothing.
        temporary = self.root / f"{_PARTIAL}{POINTER_FILE}"
        try:
            _write_synced(temporary, f"{name}\n".encode())
            temporary.replace(self.root / POINTER_FILE)
            _sync_directory(self.root)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            _log.warning("pointer to %s not written: %s", name, error)

    def _prune(self, best_step: int) -> None:
        for path in self._committed()[: -self._keep]:
            if path.name == _name(best_step):
                continue
            shutil.rmtree(path, ignore_errors=True)


def _name(step: int) -> str:
    return f"{_COMMITTED}{step:08d}"


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def _seal(partial: Path, head: dict[str, Any]) -> int:
    """Write the manifest, `head` first, and put every byte on the disk; returns the size."""
    files = {
        path.relative_to(partial).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": _digest_and_sync(path),
        }
        for path in _files(partial)
    }
    manifest = {**head, "files": files}
    _write_synced(partial / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
    for directory in {path.parent for path in _files(partial)} | {partial}:
        _sync_directory(directory)
    return sum(path.stat().st_size for path in _files(partial))


def _verify(path: Path) -> tuple[str, Checkpoint | None]:
    """What is wrong, or the checkpoint."""
    try:
        manifest: Any = json.loads((path / MANIFEST_FILE).read_bytes())
        expected = dict(manifest["files"])
        step, world_size = int(manifest["step"]), int(manifest["world_size"])
        memory = dict(manifest["memory"])
        for name, entry in expected.items():
            file = path / name
            if file.stat().st_size != entry["size_bytes"]:
                return f"{name} has the wrong size", None
            if _digest(file) != entry["sha256"]:
                return f"{name} has changed", None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing", None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}", None
    size_bytes = sum(entry["size_bytes"] for entry in expected.values())
    return "", Checkpoint(path, step, world_size, size_bytes, memory)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
