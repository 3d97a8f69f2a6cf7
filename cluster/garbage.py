"""Garbage: what nothing refers to any more and nobody will ask for, found and removed.

    packages that no version lists       from deleted versions, and from jobs that died before
                                         they registered what they had written
    checkpoints of finished runs         their model is packaged; also where `checkpoint.location`
                                         put them elsewhere
    files of tenants                     older than 30 days, or from uploads that were broken off
    work of batches that have ended
    what interrupted writers left        in the storage's staging folder
    usage, row by row                    of months that ended 30 days ago: its sums stay

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
from sqlalchemy.engine import Engine

from cluster import database
from cluster.aliases import ALIASES_LOCK
from cluster.batches import ACTIVE
from cluster.database import batches, begin_alone, deployments, later, model_versions, tenant_files
from cluster.errors import HeliostatError
from cluster.ledger import Ledger
from cluster.settings import Settings
from cluster.storage import Storage, Stored
from cluster.tenant_files import KEPT_S, TenantFile

_PACKAGES, _FILES, _BATCHES = "packages", "files", "batches"
# Of a run directory, as the training job lays it out.
_RUNS, _RUN_STATE, _RUN_LOCK, _CHECKPOINTS = "runs", "run.json", "lock", "checkpoints"
_LOCATION, _NAME = "checkpoint_location", "checkpoint_name"

_logger = logging.getLogger(__name__)

Kind = Literal["package", "checkpoints", "staging", "file", "batch", "usage"]


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed."""

    kind: Kind
    key: str
    """In storage, a path below home, where checkpoints are, or the ledger's month."""
    size_bytes: int
    age_s: float
    reason: str
    run: str = ""
    """Directory of the run that checkpoints belong to."""


def find_garbage(settings: Settings, *, older_than_s: float) -> list[Garbage]:
    """All garbage whose newest file is older than the grace period, by kind and key."""
    engine, storage = database.open_database(settings.database), Storage.open(settings.storage_root)
    # In a bucket that does not exist nothing would be found; a folder is made by the first write.
    if not storage.is_folder:
        storage.require_root()
    found = [
        *_packages(storage, _referenced(engine)),
        *_staging(storage),
        *_batch_work(storage, _active_batches(engine)),
        *_files(storage, engine),
        *_usage(engine),
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
    engine, storage = database.open_database(settings.database), Storage.open(settings.storage_root)
    match garbage.kind:
        case "usage":
            return Ledger(engine).sum_up(_name(garbage.key)) > 0
        case "file":
            return _remove_file(engine, storage, garbage)
        case "batch" if _name(garbage.key) in _active_batches(engine):
            return False
        case "package":
            # The lock under which packages are listed: none is while this looks and removes.
            with begin_alone(engine, ALIASES_LOCK):
                if _name(garbage.key) in _referenced(engine):
                    return False
                return _remove_if_old(storage, garbage)
    return _remove_if_old(storage, garbage)


def _remove_if_old(storage: Storage, garbage: Garbage) -> bool:
    """Unless it is younger than when it was found: somebody has written it again since."""
    modified_at_s = storage.modified_at_s(garbage.key)
    if modified_at_s is None or time.time() - modified_at_s < garbage.age_s:
        return False
    delete = storage.delete_file if garbage.kind == "file" else storage.delete_dir
    delete(garbage.key)
    return True


def _referenced(engine: Engine) -> set[str]:
    """Hexadecimal digests of packages that are listed, served, or what a listed one stands on."""
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


def _batch_work(storage: Storage, active: set[str]) -> Iterator[Garbage]:
    for directory in storage.directories(_BATCHES):
        if _name(directory.key) not in active:
            yield _garbage("batch", directory, "the batch has ended")


def _active_batches(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        query = sa.select(batches.c.id).where(batches.c.status.in_(ACTIVE))
        return set(connection.scalars(query))


def _files(storage: Storage, engine: Engine) -> Iterator[Garbage]:
    # Before the rows are read, so that a file which is added meanwhile has one.
    stored = storage.files(_FILES)
    with engine.connect() as connection:
        known = set(connection.scalars(sa.select(tenant_files.c.id)))
        expired = connection.execute(sa.select(tenant_files).where(_is_expired())).all()
    for row in expired:
        file = TenantFile(**row._mapping)
        age_s = time.time() - file.created_at_s
        reason = f"it is older than {KEPT_S / 86_400:g} days"
        yield Garbage("file", file.key, file.num_bytes, age_s, reason)
    for each in stored:
        if _name(each.key) not in known:
            yield _garbage("file", each, "no upload ended with it")


def _is_expired() -> sa.ColumnElement[bool]:
    """Which files may go: batches under way still read theirs."""
    wanted = sa.select(batches.c.input_file_id).where(batches.c.status.in_(ACTIVE))
    is_old = tenant_files.c.created_at < later(-KEPT_S)
    return sa.and_(is_old, tenant_files.c.id.not_in(wanted))


def _remove_file(engine: Engine, storage: Storage, garbage: Garbage) -> bool:
    itself = tenant_files.c.id == _name(garbage.key)
    with engine.begin() as connection:
        deleted = connection.execute(sa.delete(tenant_files).where(itself, _is_expired()))
        if deleted.rowcount == 0:
            is_known = connection.scalar(sa.select(tenant_files.c.id).where(itself)) is not None
            return not is_known and _remove_if_old(storage, garbage)
    storage.delete_file(garbage.key)
    return True


def _usage(engine: Engine) -> Iterator[Garbage]:
    for month in Ledger(engine).months_to_sum():
        age_s = time.time() - month.ended_at_s
        reason = f"{month.num_entries:,} rows of gateways become their sums"
        yield Garbage("usage", f"ledger/{month.name}", 0, age_s, reason)


def _garbage(kind: Kind, stored: Stored, reason: str) -> Garbage:
    return Garbage(kind, stored.key, stored.size_bytes, time.time() - stored.modified_at_s, reason)


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
