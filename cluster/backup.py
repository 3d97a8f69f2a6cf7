"""A backup: the whole state of a stack in one file, sealed by an index of digests at its end.

    tables/NAME.jsonl     every SQL table, whichever database holds it
    mlflow/…              the local MLflow server's database and artifacts
    storage/…             packages and datasets
    home/…                keys, settings, runs with their checkpoints
    backup.json           what is in it, with every file's digest; last, so that its absence tells
                          of a backup that was cut short

It can be taken while the stack runs: tables come first and in one transaction, and what they refer
to is never changed. It holds the signing key and the API key, so it is readable by its owner only.

    write_backup(settings, Path("heliostat.tar"))
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa
from pydantic import Field

from cluster import database
from cluster.config import StrictModel
from cluster.errors import ConflictError, MachineError, as_machine_error
from cluster.settings import SETTINGS_FILE, Settings
from cluster.storage import Storage

INDEX = "backup.json"
FORMAT_VERSION = 1
TABLES, MLFLOW, STORAGE, HOME = "tables", "mlflow", "storage", "home"
MLFLOW_DATABASE = "mlflow.db"
# Of the home directory; the rest is made anew by `up`.
_KEPT = ("keys", "runs")
# Names of files that belong to running or interrupted processes.
_PASSING = ("lock", ".partial-", ".new-")


class MemberInfo(StrictModel):
    """One file of a backup."""

    size_bytes: int = Field(ge=0)
    sha256: str


class BackupIndex(StrictModel):
    """The content of `backup.json`."""

    format_version: int = FORMAT_VERSION
    created_at: str
    storage_root: str
    """Where packages lay: part of their recorded location."""
    storage_is_folder: bool
    members: dict[str, MemberInfo]


def write_backup(settings: Settings, path: Path) -> BackupIndex:
    """Write all state to a new file.

    Raises:
        ConflictError: the file exists.
        MachineError: it cannot be written; nothing is left of it.
    """
    try:
        if path.exists():
            raise _exists(path)
        if not path.parent.is_dir():
            raise MachineError(f"{path.parent} is no directory", hint="make it first")
        with _new_file(path) as file:
            index = _Writer(file, settings).run()
    except OSError as error:
        raise (as_machine_error(error) or error) from None
    return index


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file of mode 0600 that appears at `path` once it is whole, and replaces nothing."""
    # Under a name that nobody can have made before, who would then read the keys or have us
    # overwrite another file.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".backup-", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)
    except FileExistsError:
        raise _exists(path) from None
    finally:
        Path(name).unlink(missing_ok=True)


def _exists(path: Path) -> ConflictError:
    return ConflictError(f"{path} exists already", hint="choose another name, or remove it")


class _Writer:
    def __init__(self, file: BinaryIO, settings: Settings) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._settings = settings
        self._members: dict[str, MemberInfo] = {}

    def run(self) -> BackupIndex:
        storage = Storage.open(self._settings.storage_root)
        if self._has_versions():
            # Of a disk that is not mounted, or a bucket of another name, there is nothing to list:
            # a backup without its packages would look whole.
            storage.require_root()
        with self._tar:
            self._add_tables()
            self._add_mlflow(self._settings.home / "mlflow")
            for key, size_bytes in storage.contents():
                with storage.reading(key) as stream:
                    self._add(f"{STORAGE}/{key}", stream, size_bytes)
            self._add_home()
            index = BackupIndex(
                created_at=database.now(),
                storage_root=storage.root,
                storage_is_folder=storage.is_folder,
                members=self._members,
            )
            self._add_bytes(INDEX, index.model_dump_json(indent=1).encode())
        return index

    def _has_versions(self) -> bool:
        with database.open_database(self._settings.database).connect() as connection:
            return connection.scalar(sa.select(database.model_versions.c.name).limit(1)) is not None

    def _add_tables(self) -> None:
        engine = database.open_database(self._settings.database)
        with engine.connect() as connection:
            database.read_one_moment(connection)
            for table in database.metadata.sorted_tables:
                rows = connection.execute(sa.select(table)).mappings()
                lines = (json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
                self._add_bytes(f"{TABLES}/{table.name}.jsonl", "".join(lines).encode())

    def _add_mlflow(self, directory: Path) -> None:
        source = directory / MLFLOW_DATABASE
        if not source.exists():
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / MLFLOW_DATABASE
            with sqlite3.connect(source) as ours, sqlite3.connect(copy) as theirs:
                # A consistent copy, also while the server writes.
                ours.backup(theirs)
            self._add_file(f"{MLFLOW}/{MLFLOW_DATABASE}", copy)
        self._add_tree(directory / "artifacts", f"{MLFLOW}/artifacts")

    def _add_home(self) -> None:
        home = self._settings.home
        if (home / SETTINGS_FILE).exists():
            self._add_file(f"{HOME}/{SETTINGS_FILE}", home / SETTINGS_FILE)
        for name in _KEPT:
            self._add_tree(home / name, f"{HOME}/{name}")

    def _add_tree(self, directory: Path, name: str) -> None:
        for path in _files(directory):
            self._add_file(f"{name}/{path.relative_to(directory).as_posix()}", path)

    def _add_file(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            self._add(name, file, size_bytes, mode=path.stat().st_mode & 0o777)

    def _add_bytes(self, name: str, data: bytes) -> None:
        self._add(name, io.BytesIO(data), len(data))

    def _add(self, name: str, source: Any, size_bytes: int, mode: int = 0o644) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size_bytes, mode
        digesting = _Digesting(source)
        self._tar.addfile(member, digesting)
        self._members[name] = MemberInfo(size_bytes=size_bytes, sha256=digesting.hexdigest())


class _Digesting:
    """A stream that digests what is read of it."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._source.read(size))
        self._digest.update(data)
        return data

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    """Plain files that stay; a run that trains meanwhile is kept up to its last checkpoint."""
    for path in sorted(directory.rglob("*")):
        names = path.relative_to(directory).parts
        if any(name.startswith(_PASSING) for name in names):
            continue
        if path.is_file() and not path.is_symlink():
            yield path
