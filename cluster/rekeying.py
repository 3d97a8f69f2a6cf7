"""Encrypting every stored package with a new key; who was interrupted goes on where it stopped.

The keyset and the packages themselves hold all of the progress: what is not encrypted with the
primary key is still to do, and only when nothing is does the next call make a new key.

    rekeyed = rekey(storage, keyset, say=print)
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from cluster.errors import ConflictError, PackageError
from cluster.model_package import Keyset
from cluster.model_package.stored import reencrypt, sealed_with
from cluster.storage import Storage


@dataclass(frozen=True)
class Rekeyed:
    """What was done."""

    key_id: int
    """Of the key that everything is encrypted with now."""
    is_new: bool
    """Whether it was made for this; otherwise an earlier call was finished."""
    num_packages: int


def rekey(
    storage: Storage, keyset: Keyset, *, listed: Collection[str] = (), say: Callable[[str], None]
) -> Rekeyed:
    """Encrypt each stored package with one key, a new one unless some were left to do.

    The last key stays in the keyset until the next new one, because a package may be on its way.

    Args:
        listed: digests of the registered packages. While one of them is not in storage, every key
            stays: it may lie where its disk, or a backup, is missing.

    Raises:
        NotRunningError: there is no keyset yet.
        ConflictError: another process is at it.
        PackageError: some packages could not be read; all others are done.
    """
    with _alone(keyset):
        primary = keyset.open().primary_id
        found = {digest: _key_of(digest, storage) for digest in _stored(storage)}
        is_new = all(key_id == primary for key_id in found.values())
        absent = set(listed) - found.keys()
        if absent:
            say(f"{len(absent)} registered packages are not in storage: all their keys are kept")
        if is_new:
            keyset.rotate(keep=keyset.open().ids if absent else ())
        keys = keyset.open()
        todo = [digest for digest, key_id in found.items() if key_id != keys.primary_id]
        failures = []
        for number, digest in enumerate(todo, 1):
            try:
                reencrypt(digest, storage, keys)
            except PackageError as error:
                failures.append(f"{digest}: {error.message}")
            else:
                say(f"{number} of {len(todo)}: {digest}")
    if failures:
        raise PackageError(
            f"{len(failures)} of {len(todo)} packages could not be encrypted anew, "
            f"first {failures[0]}",
            hint="restore or delete those and run it again",
        )
    return Rekeyed(keys.primary_id, is_new, len(todo))


def _stored(storage: Storage) -> Iterator[str]:
    for directory in storage.directories("packages"):
        name = directory.key.removeprefix("packages/")
        if len(name) == 64 and storage.exists(directory.key):
            yield f"sha256:{name}"


def _key_of(digest: str, storage: Storage) -> int | None:
    """None where any of it is plain, and where what it says of its key is broken: to be done."""
    try:
        return sealed_with(digest, storage)
    except PackageError:
        return None


@contextlib.contextmanager
def _alone(keyset: Keyset) -> Iterator[None]:
    path = keyset.path.with_name(f"lock-{keyset.path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConflictError(
                "packages are being encrypted anew by another process", hint="wait for it"
            ) from None
        yield
