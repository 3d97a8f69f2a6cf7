"""Files that a run keeps: plain ones only, and one that cannot be used is one line.

data = read_file(run_dir / "events.jsonl")      # None: there is none
with usable(path): path.touch()
"""

from __future__ import annotations

import contextlib
import errno
import stat
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import MachineError


def require_plain(path: Path) -> None:
    """Raises OSError if it is anything but a file with bytes in it: a pipe would be waited at."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(path))


def read_file(path: Path) -> bytes | None:
    """What is in a file; None if there is none. Raises MachineError if it cannot be used."""
    with usable(path):
        try:
            require_plain(path)
            return path.read_bytes()
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """Raises MachineError where a file cannot be used."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{path} cannot be used: {error.strerror or error}",
            hint="move it away or correct its permissions, and run the same command again",
        ) from None
