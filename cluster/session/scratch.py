"""A short private directory for Ray's and HAProxy's sockets, logs and temporary files.

The path of a Unix socket may have 107 bytes and Ray spends 73 of them on names of its own, so
a home that lies deep gets its scratch directory under /tmp.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

from cluster.errors import MachineError

_SOCKET_PATH_MAX_BYTES = 107
# <scratch>/h/<56 hex digits of a node id>/a.<pid>.tmp, and
# <scratch>/ray/session_<42 characters>/sockets/dash_MetricsHead
_LONGEST_NAME_BYTES = 73
_NUM_SESSIONS_KEPT = 2


def scratch_dir(home: Path) -> Path:
    """Where the scratch of the stack in `home` lies; always the same answer."""
    inside = home / "run"
    if len(os.fsencode(inside)) + _LONGEST_NAME_BYTES <= _SOCKET_PATH_MAX_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    return Path(f"/tmp/heliostat-{os.getuid()}-{digest}")  # noqa: S108 - checked to be ours


def prepare_scratch(path: Path) -> None:
    """Create the directory, or make sure that the one there is ours alone.

    Raises:
        MachineError: somebody else owns it or may enter it.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise MachineError(
            f"scratch directory {path} is not a private directory of this user",
            hint="remove it, or choose a short home with HELIOSTAT_HOME=/short/path",
        )
    (path / "tmp").mkdir(mode=0o700, exist_ok=True)
    _forget_old_sessions(path / "ray")


def remove_temporary_files(path: Path) -> None:
    """Delete what only running processes need; Ray's logs stay for reading."""
    for name in ("tmp", "h"):
        shutil.rmtree(path / name, ignore_errors=True)


def _forget_old_sessions(ray_dir: Path) -> None:
    sessions = sorted(path for path in ray_dir.glob("session_2*") if not path.is_symlink())
    for session in sessions[:-_NUM_SESSIONS_KEPT]:
        shutil.rmtree(session, ignore_errors=True)
