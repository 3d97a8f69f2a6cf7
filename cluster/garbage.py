"""Garbage: what nothing refers to any more and nobody will ask for, found and removed.

    packages that no version lists       from deleted versions, and from jobs that died before
                                         they registered what they had written
    checkpoints of finished runs         their model is packaged; also where `checkpoint.location`
                                         put them elsewhere
    what interrupted writers left        in the storage's staging folder

What is younger than a grace period is left alone, since somebody may be about to refer to it.

    for garbage in find_garbage(settings, older_than_s=86400): print(garbage.path)
    remove(garbage, settings)
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from cluster import database
from cluster.aliases import ALIASES_LOCK
from cluster.database import begin_alone, deployments, model_versions
from cluster.errors import HeliostatError
from cluster.settings import Settings
from cluster.storage import Storage, StoredDirectory

_PACKAGES = "packages"
# Of a run directory, as the training job lays it out.
_RUNS, _RUN_STATE, _RUN_LOCK, _CHECKPOINTS = "runs", "run.json", "lock", "checkpoints"
_LOCATION, _NAME = "checkpoint_location", "checkpoint_name"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed."""

    kind: Literal["package", "checkpoints", "staging"]
    key: str
    """Of a package or staging folder in storage, a path below home, or where checkpoints are."""
    size_bytes: int
    age_s: float
    reason: str
    run: str = ""
    """Directory of the run that checkpoints belong to."""


def find_garbage(settings: Settings, *, older_than_s: float) -> list[Garbage]:
    """All garbage whose newest file is older than the grace period, by kind and key."""
    storage = Storage.open(settings.storage_root)
    # In a bucket that does not exist nothing would be found; a folder is made by the first write.
    if not storage.is_folder:
        storage.require_root()
    found = [
        *_packages(storage, _referenced(settings)),
        *_staging(storage),
        *(found for run in _runs(settings) for found in _checkpoints(run)),
    ]
    return sorted(
        (garbage for garbage in found if garbage.age_s >= older_than_s),
        key=lambda garbage: (garbage.kind, garbage.key),
    )


def remove(garbage: Garbage, settings: Settings) -> bool:
    """Remove it; False if something refers to it by now, it was published again, or a run has been
    taken up again."""
    if garbage.kind == "checkpoints":
        return _remove_checkpoints(settings.home / _RUNS / garbage.run, garbage.key)
    storage = Storage.open(settings.storage_root)
    if garbage.kind == "staging":
        return _remove_if_old(storage, garbage)
    # The lock under which packages are listed: none is while this looks and removes.
    with begin_alone(database.open_database(settings.database), ALIASES_LOCK):
        if _name(garbage.key) in _referenced(settings):
            return False
        return _remove_if_old(storage, garbage)


def _remove_if_old(storage: Storage, garbage: Garbage) -> bool:
    """Unless it is younger than when it was found: somebody has written it again since."""
    modified_at_s = storage.modified_at_s(garbage.key)
    if modified_at_s is None or time.time() - modified_at_s < garbage.age_s:
        return False
    storage.delete_dir(garbage.key)
    return True


def _referenced(settings: Settings) -> set[str]:
    """Hexadecimal digests of packages that are listed, served, or what a listed one stands on."""
    engine = database.open_database(settings.database)
    columns = (model_versions.c.digest, model_versions.c.parent_digest, deployments.c.digest)
    with engine.connect() as connection:
        digests = {digest for column in columns for digest in connection.scalars(sa.select(column))}
    return {digest.removeprefix("sha256:") for digest in digests if digest}


def _packages(storage: Storage, referenced: set[str]) -> Iterator[Garbage]:
    for directory in storage.directories(_PACKAGES):
        if _name(directory.key) not in referenced:
            yield _garbage("package", directory, "no version lists it")


def _staging(storage: Storage) -> Iterator[Garbage]:
    for directory in storage.stages():
        yield _garbage("staging", directory, "its writer was interrupted")


def _garbage(
    kind: Literal["package", "staging"], directory: StoredDirectory, reason: str
) -> Garbage:
    age_s = time.time() - directory.modified_at_s
    return Garbage(kind, directory.key, directory.size_bytes, age_s, reason)


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _runs(settings: Settings) -> list[Path]:
    return [path.parent for path in sorted((settings.home / _RUNS).glob(f"*/{_RUN_STATE}"))]


def _checkpoints(run: Path) -> Iterator[Garbage]:
    """Of a finished run: beside its state and elsewhere."""
    state = _read_state(run)
    if not state.get("result"):
        return
    reason = "the run is finished and its model packaged"
    directory = run / _CHECKPOINTS
    if files := [path.stat() for path in directory.rglob("*") if path.is_file()]:
        size_bytes = sum(file.st_size for file in files)
        age_s = time.time() - max(file.st_mtime for file in files)
        key = f"{_RUNS}/{run.name}/{_CHECKPOINTS}"
        yield Garbage("checkpoints", key, size_bytes, age_s, reason, run.name)
    if not (state.get(_LOCATION) and state.get(_NAME)):
        return
    try:
        storage = Storage.open(state[_LOCATION])
        storage.require_root()
        saved = storage.directories(state[_NAME])
    except HeliostatError as error:
        _logger.warning("checkpoints of run %s are left alone: %s", run.name, error.message)
        return
    if saved:
        size_bytes = sum(each.size_bytes for each in saved)
        age_s = time.time() - max(each.modified_at_s for each in saved)
        key = storage.path(state[_NAME])
        yield Garbage("checkpoints", key, size_bytes, age_s, reason, run.name)


def _read_state(run: Path) -> dict[str, Any]:
    """What a run says of itself; empty where that cannot be read."""
    try:
        state = json.loads((run / _RUN_STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _remove_checkpoints(run: Path, key: str) -> bool:
    """Under the run's own lock, so that no training begins there meanwhile."""
    try:
        with (run / _RUN_LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = _read_state(run)
            if not state.get("result"):
                return False
            if key == f"{_RUNS}/{run.name}/{_CHECKPOINTS}":
                shutil.rmtree(run / _CHECKPOINTS, ignore_errors=True)
            else:
                Storage.open(state[_LOCATION]).delete_dir(state[_NAME])
    except BlockingIOError:
        return False
    return True
