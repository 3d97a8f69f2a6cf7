"""`home/session.json`: what `up` started, so that `down` ends that and nothing else.

with locked(home):
    record = read_record(home)
    write_record(home, record.with_part("ray", process))
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from cluster.config import StrictModel
from cluster.session.processes import ProcessRecord

RECORD_FILE = "session.json"
LOCK_FILE = "session.lock"


class SessionRecord(StrictModel):
    """The processes of a stack by part, and its scratch directory."""

    scratch_dir: Path | None = None
    parts: dict[str, ProcessRecord] = Field(default_factory=dict)

    def with_part(self, name: str, process: ProcessRecord) -> SessionRecord:
        return self.model_copy(update={"parts": {**self.parts, name: process}})

    def without_part(self, name: str) -> SessionRecord:
        parts = {key: value for key, value in self.parts.items() if key != name}
        return self.model_copy(update={"parts": parts})


def read_record(home: Path) -> SessionRecord:
    """The record, or an empty one: processes are also found by their environment."""
    try:
        return SessionRecord.model_validate_json((home / RECORD_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return SessionRecord()


def write_record(home: Path, record: SessionRecord) -> None:
    staged = home / f"{RECORD_FILE}.tmp"
    staged.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    staged.replace(home / RECORD_FILE)


def delete_record(home: Path) -> None:
    (home / RECORD_FILE).unlink(missing_ok=True)


@contextmanager
def locked(home: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the stack's lock; say so if another `up` or `down` must finish first."""
    with (home / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another `heliostat up` or `down` to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
