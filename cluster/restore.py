"""Restoring a backup into an empty home: verified as a whole before anything is put in place.

It knows the format from `cluster.backup`.

    restore_backup(Path("heliostat.tar"), Path("/new/home"), lambda home: load_settings(home=home))
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from cluster import database
from cluster.backup import FORMAT_VERSION, HOME, INDEX, MLFLOW, STORAGE, TABLES, BackupIndex
from cluster.database import model_versions
from cluster.errors import (
    ConflictError,
    HeliostatError,
    InputError,
    MachineError,
    as_machine_error,
)
from cluster.settings import Settings
from cluster.storage import Storage

_COPY_BYTES = 1024**2


def restore_backup(path: Path, home: Path, load: Callable[[Path], Settings]) -> BackupIndex:
    """Make `home` what it was when the backup was taken; it must not hold anything yet.

    Args:
        load: the settings of a home directory.

    Raises:
        InputError: the file is no backup, is cut short or damaged.
        ConflictError: there is state already, in home, the database or storage.
        MachineError: it cannot be written; home is as it was.
    """
    _require_empty(home)
    try:
        _require_file(path)
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=home.parent, prefix=".restoring-", ignore_cleanup_errors=True
        ) as scratch:
            stage = Path(scratch)
            index = _unpack(path, stage)
            staged_home = stage / HOME
            for private in (staged_home, staged_home / "keys"):
                private.mkdir(exist_ok=True)
                private.chmod(0o700)
            with contextlib.ExitStack() as undo:
                _fill(path, index, stage, load(staged_home), home, undo)
                if home.exists():
                    home.rmdir()
                staged_home.rename(home)
                undo.pop_all()
    except OSError as error:
        raise (as_machine_error(error) or _cannot_write(home, error)) from None
    return index


def _require_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist", hint="give the path of a backup")
    # A pipe would be waited for, maybe for ever.
    if not path.is_file():
        raise InputError(f"{path} is no regular file", hint="give the path of a backup")


def _require_empty(home: Path) -> None:
    if home.exists() and any(home.iterdir()):
        raise ConflictError(
            f"{home} is not empty",
            hint="restore into a new one: HELIOSTAT_HOME=/new/path heliostat restore FILE",
        )


def _cannot_write(home: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{home} cannot be written: {error.strerror or error}",
        hint="check its permissions, or choose another HELIOSTAT_HOME",
    )


def _unpack(path: Path, stage: Path) -> BackupIndex:
    """Extract everything, then compare it with the index."""
    try:
        with tarfile.open(path, "r:") as tar:
            found = {}
            for member in tar:
                if not member.isreg() or not _is_inner(member.name):
                    raise _damaged(path, f"{member.name} is no plain file of a backup")
                found[member.name] = _extract(tar, member, stage)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if INDEX not in found:
        raise _damaged(path, f"it has no {INDEX} at its end: it was cut short")
    index = _read_index(path, found.pop(INDEX))
    for name in sorted(found.keys() ^ index.members.keys()):
        raise _damaged(path, f"{name} is {'missing' if name in index.members else 'unexpected'}")
    for name, expected in index.members.items():
        with found[name].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise _damaged(path, f"{name} has changed")
    return index


def _is_inner(name: str) -> bool:
    """Whether a name stays below where it is unpacked."""
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, stage: Path) -> Path:
    """By hand: tarfile's own filters came with Python 3.11.4."""
    target = stage / member.name
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None, "a plain file has content"
    with source, target.open("xb") as file:
        target.chmod(member.mode & 0o755)
        shutil.copyfileobj(source, file, _COPY_BYTES)
    return target


def _read_index(path: Path, file: Path) -> BackupIndex:
    try:
        values = json.loads(file.read_bytes())
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise InputError(
                f"{path} has backup format {version}, and this Heliostat reads {FORMAT_VERSION}",
                hint="restore it with the version that wrote it, or a newer one",
            )
        return BackupIndex.model_validate(values)
    except (ValueError, AttributeError, ValidationError, RecursionError) as error:
        raise _damaged(path, f"{INDEX} cannot be read: {str(error).splitlines()[0]}") from None


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a whole backup: {reason}", hint="use another copy")


def _fill(
    path: Path,
    index: BackupIndex,
    stage: Path,
    settings: Settings,
    home: Path,
    undo: contextlib.ExitStack,
) -> None:
    """Fill the staged home, and the storage and database that its settings name.

    Args:
        undo: what takes back what was written to a storage that lies elsewhere.
    """
    storage = Storage.open(settings.storage_root)
    if storage.is_folder != index.storage_is_folder:
        kinds = ("a folder", "an object store")
        was, is_now = kinds if index.storage_is_folder else kinds[::-1]
        raise ConflictError(
            f"the backup's storage was {was}, and storage_url is {is_now}",
            hint=f"set HELIOSTAT_STORAGE_URL to {was}",
        )
    if storage.contents():
        raise ConflictError(f"storage {storage.root} is not empty", hint="choose another one")
    engine = database.open_database(settings.database)
    new_root = storage.root.replace(str(settings.home), str(home), 1)
    with engine.begin() as connection:
        _fill_tables(path, connection, stage / TABLES)
        _move_locations(connection, index.storage_root, new_root)
        for name in sorted(index.members):
            if name.startswith(f"{STORAGE}/"):
                key = name.removeprefix(f"{STORAGE}/")
                undo.callback(_unwrite, storage, key)
                with (stage / name).open("rb") as file:
                    storage.write_file(key, file)
    engine.dispose()
    if (stage / MLFLOW).exists():
        (stage / MLFLOW).rename(settings.home / "mlflow")


def _unwrite(storage: Storage, key: str) -> None:
    """Remove a file and the directories that are empty without it; what fails here stays."""
    with contextlib.suppress(HeliostatError, OSError):
        storage.delete_file(key)
        if (file := storage.local_path(key)) is not None:
            for directory in list(file.parents)[: key.count("/")]:
                directory.rmdir()


def _fill_tables(path: Path, connection: Connection, directory: Path) -> None:
    for table in database.metadata.sorted_tables:
        if connection.scalar(sa.select(sa.func.count()).select_from(table)):
            raise ConflictError(
                f"the database's table '{table.name}' is not empty",
                hint="choose another database with HELIOSTAT_DATABASE_URL",
            )
        file = directory / f"{table.name}.jsonl"
        # A table that is younger than the backup stays empty.
        if not file.exists():
            continue
        try:
            rows = _read_rows(file, table)
            if rows:
                connection.execute(sa.insert(table), rows)
        except sa.exc.OperationalError:
            raise
        except (ValueError, OverflowError, RecursionError, sa.exc.StatementError) as error:
            reason = str(error).splitlines()[0][:200]
            raise _damaged(path, f"{TABLES}/{file.name} cannot be read: {reason}") from None
        if connection.dialect.name == "postgresql" and "id" in table.columns:
            _count_on(connection, table)


def _read_rows(file: Path, table: sa.Table) -> list[dict[str, Any]]:
    """Raises ValueError for what are no rows of the table."""
    # Not splitlines: a text may hold other line breaks.
    lines = file.read_bytes().decode().split("\n")
    rows = [json.loads(line) for line in lines if line]
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError("a line is no object")
        if unknown := row.keys() - table.columns.keys():
            raise ValueError(f"unknown column {min(unknown)!r}")
    return rows


def _count_on(connection: Connection, table: sa.Table) -> None:
    """PostgreSQL counts by itself, and has not seen the numbers that were inserted."""
    column = table.columns["id"]
    if column.autoincrement is True:
        connection.execute(
            sa.select(
                sa.func.setval(
                    sa.func.pg_get_serial_sequence(table.name, "id"),
                    sa.select(sa.func.max(column)).scalar_subquery(),
                )
            )
        )


def _move_locations(connection: Connection, old_root: str, new_root: str) -> None:
    column = model_versions.c.location
    for location in connection.scalars(sa.select(column).distinct()).all():
        if location.startswith(f"{old_root}/"):
            moved = new_root + location.removeprefix(old_root)
            connection.execute(
                sa.update(model_versions).where(column == location).values(location=moved)
            )
