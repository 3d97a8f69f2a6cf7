"""Files of tenants: rows in SQL, bytes in storage; nobody reaches another tenant's.

A file is there when its row is, and its bytes are written before that. What a client calls it is
shown and never becomes part of a path.

    files = TenantFiles(open_database(settings.database), Storage.open(settings.storage_root))
    file = files.add("acme", "requests.jsonl", "batch", [b'{"custom_id": …'])
    for block in files.read(file): …
"""

from __future__ import annotations

import secrets
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Engine

from cluster.database import now, tenant_files
from cluster.errors import NotFoundError
from cluster.storage import Storage

KEPT_S = 30 * 86_400.0
"""How long a file is there for sure, unless its tenant deletes it."""

_BLOCK_BYTES = 256 * 1024
_MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True)
class TenantFile:
    """One file; the time is ISO 8601 in UTC."""

    id: str
    tenant: str
    name: str
    purpose: str
    """batch, or batch_output."""
    num_bytes: int
    created_at: str

    @property
    def created_at_s(self) -> float:
        """In seconds since 1970."""
        return datetime.fromisoformat(self.created_at).timestamp()

    @property
    def key(self) -> str:
        """Where its bytes are in storage."""
        return f"files/{self.tenant}/{self.id}"


class TenantFiles:
    """The files in one database and one storage."""

    def __init__(self, engine: Engine, storage: Storage) -> None:
        self._engine = engine
        self._storage = storage

    def add(
        self,
        tenant: str,
        name: str,
        purpose: str,
        blocks: Iterable[bytes],
        *,
        file_id: str | None = None,
    ) -> TenantFile:
        """Keep a file; with a `file_id`, one that is there already is left as it is."""
        is_new = file_id is None
        file_id = file_id or f"file-{secrets.token_hex(16)}"
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for block in blocks:
                size += len(block)
                yield block

        key = f"files/{tenant}/{file_id}"
        try:
            self._storage.write_chunks(key, counted())
            file = TenantFile(file_id, tenant, clean_name(name), purpose, size, now())
            with self._engine.begin() as connection:
                dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
                row = dialect.insert(tenant_files).values(asdict(file))
                connection.execute(row.on_conflict_do_nothing())
        except BaseException:
            if is_new:
                self._storage.delete_file(key)
            raise
        return file

    def get(self, tenant: str, file_id: str) -> TenantFile:
        """Raises NotFoundError, for another tenant's file too."""
        columns = tenant_files.c
        query = sa.select(tenant_files).where(columns.id == file_id, columns.tenant == tenant)
        with self._engine.connect() as connection:
            # PostgreSQL takes no NUL in a text.
            row = None if "\0" in file_id else connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(
                f"there is no file {file_id[:80]!r}", hint="see GET /v1/files", param="file_id"
            )
        return TenantFile(**row._mapping)

    def list(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        ascending: bool = False,
    ) -> list[TenantFile]:
        """A tenant's files, newest first unless `ascending`; those after one, at most `limit`."""
        columns = tenant_files.c
        query = sa.select(tenant_files).where(columns.tenant == tenant)
        if purpose is not None:
            query = query.where(columns.purpose == purpose.replace("\0", "\ufffd"))
        order = (columns.created_at, columns.id)
        if after is not None:
            last = self.get(tenant, after)
            seen, found = sa.tuple_(*order), sa.tuple_(last.created_at, last.id)
            query = query.where(seen > found if ascending else seen < found)
        query = query.order_by(*(c if ascending else c.desc() for c in order)).limit(limit)
        with self._engine.connect() as connection:
            return [TenantFile(**row._mapping) for row in connection.execute(query)]

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises NotFoundError."""
        file = self.get(tenant, file_id)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(tenant_files).where(tenant_files.c.id == file.id))
        self._storage.delete_file(file.key)

    def read(self, file: TenantFile) -> Iterator[bytes]:
        """The bytes, a block at a time."""
        with self._storage.reading(file.key) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield bytes(block)

    def lines(self, file: TenantFile, *, max_bytes: int) -> Iterator[bytes]:
        """As Storage.lines."""
        yield from self._storage.lines(file.key, max_bytes=max_bytes)


def clean_name(name: str) -> str:
    """A file's name without folders and without characters that do things to a terminal."""
    base = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(c for c in base if unicodedata.category(c)[0] != "C")
    return shown.strip()[:_MAX_NAME_CHARACTERS] or f"file-{time.time_ns()}"
