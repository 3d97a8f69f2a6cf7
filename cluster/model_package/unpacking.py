"""Take the model out of a verified package: plain files, for whoever knows nothing of packages.

unpack(open_version(version, settings), Path("out"))   # a Hugging Face directory, a peft one, …
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

from cluster.errors import InputError, MachineError
from cluster.model_package.files import copy_files
from cluster.model_package.reader import ModelPackage


def unpack(package: ModelPackage, target: Path) -> None:
    """Write what lies in the package's `model/` to a directory that is empty or not there yet.

    It appears whole or not at all.

    Raises:
        InputError: there is something at `target`, it is a mount point, or lies in the cache.
        MachineError: it cannot be written there.
    """
    target = target.absolute()
    if target.is_symlink() or (target.exists() and not _is_empty_directory(target)):
        raise InputError(
            f"'{target}' exists and is not an empty directory", hint="name another directory"
        )
    if target.resolve().is_relative_to(cache := package.path.parent.resolve()):
        raise InputError(f"'{target}' lies in the package cache {cache}", hint="name another place")
    if target.is_mount():
        raise _mount_point(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            copy_files(package.model_dir, stage / "model")
            # Takes the place of an empty directory, and of nothing else.
            (stage / "model").rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _mount_point(target) from None
        raise MachineError(
            f"'{target}' cannot be written: {error.strerror or error}",
            hint="check the path, its permissions and the free space",
        ) from None


def _mount_point(target: Path) -> InputError:
    return InputError(
        f"'{target}' is a mount point, which cannot be replaced as a whole",
        hint=f"name a directory in it: '{target / 'model'}'",
    )


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
