"""`heliostat doctor`: does this machine have what a local stack needs, and if not, what to do.

for check in examine(settings):
    print(check.name, check.ok, check.found, check.next_step)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.session.ports import PORTS, is_free
from cluster.session.record import read_record
from cluster.settings import Settings

_GIB = 1024**3
_MIN_DISK_BYTES = 5 * _GIB
_MIN_MEMORY_BYTES = 6 * _GIB


@dataclass(frozen=True)
class Check:
    """One thing examined. `next_step` is empty when it is well."""

    name: str
    ok: bool
    found: str
    next_step: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which one would repair them."""
    return [
        _python(),
        _compiler(),
        _ninja(),
        *(_library(name) for name in ("ray", "torch", "deepspeed", "mlflow", "transformers")),
        _memory(),
        _shared_memory(settings),
        _disk(settings),
        _ports(settings),
    ]


def _check(name: str, ok: bool, found: str, next_step: str) -> Check:
    return Check(name, ok, found, "" if ok else next_step)


def _python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    step = "create the environment with Python 3.11 or newer"
    return _check("Python", sys.version_info >= (3, 11), found, step)


def _compiler() -> Check:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    step = "install one, e.g. `apt-get install g++`; DeepSpeed compiles an extension once"
    return _check("C++ compiler", found is not None, found or "none", step)


def _ninja() -> Check:
    found = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    return _check("ninja", found is not None, found or "none", "pip install ninja")


def _library(name: str) -> Check:
    """Looked up, not imported: importing all of them takes many seconds."""
    if importlib.util.find_spec(name) is None:
        return Check(name, False, "not installed", "run `make install`")
    return Check(name, True, importlib.metadata.version(name))


def _memory() -> Check:
    available_bytes = psutil.virtual_memory().available
    step = "close other programs; the demo wants about 6 GiB"
    return _check("free memory", available_bytes >= _MIN_MEMORY_BYTES, _gib(available_bytes), step)


def _shared_memory(settings: Settings) -> Check:
    path = Path("/dev/shm")  # noqa: S108 - the mount itself
    if not path.is_dir():
        return Check("shared memory", True, "not used on this system")
    free_bytes = shutil.disk_usage(path).free
    step = (
        f"Ray wants {_gib(settings.object_store_bytes)}: enlarge /dev/shm (docker: --shm-size) "
        "or set HELIOSTAT_OBJECT_STORE_BYTES"
    )
    return _check(
        "shared memory", free_bytes >= settings.object_store_bytes, _gib(free_bytes), step
    )


def _disk(settings: Settings) -> Check:
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free_bytes = shutil.disk_usage(place).free
    step = f"free some space on {place}, or move state with HELIOSTAT_HOME"
    return _check("free disk", free_bytes >= _MIN_DISK_BYTES, _gib(free_bytes), step)


def _ports(settings: Settings) -> Check:
    if read_record(settings.home).parts:
        return Check("ports", True, "held by this stack, see `heliostat status`")
    names = [name for part in PORTS.values() for name in part]
    taken = [name for name in names if not is_free(getattr(settings, name))]
    found = ", ".join(f"{name} {getattr(settings, name)} is taken" for name in taken)
    movable = " ".join(f"HELIOSTAT_{name.upper()}=PORT" for name in taken)
    step = f"end what holds them, or move ours: {movable}"
    return _check("ports", not taken, found or "free", step)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
