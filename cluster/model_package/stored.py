"""Packages as they lie in storage: plain, or with every file encrypted. `FORMAT.md`, section 7.

An encrypted package has `encryption.json` and, for each file NAME, `NAME.aead`. What is fetched is
plain and unverified; the reader verifies it.

    publish(directory, digest, storage, keyset)
    fetch(digest, storage, target, keyset)
    reencrypt(digest, storage, keyset.open())
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from cluster.errors import DecryptionError, ForbiddenFileError, NotFoundError
from cluster.model_package.encryption import ALGORITHM, Keys, Keyset, bound_to
from cluster.model_package.files import check_file_name, list_files
from cluster.model_package.manifest import package_key
from cluster.storage import Storage

ENCRYPTION = "encryption.json"
SUFFIX = ".aead"
_FORMAT_VERSION = 1
_COPY_BYTES = 1024**2
# Of Tink: 32 bits without a sign.
_KEY_IDS = range(2**32)


def publish(directory: Path, digest: str, storage: Storage, keyset: Keyset | None) -> None:
    """Put a signed package into storage, whole or not at all; `directory` may be used up.

    Args:
        keyset: None leaves it plain.

    Raises:
        NotRunningError: the keyset is not there.
    """
    if keyset is None:
        storage.put_dir(directory, package_key(digest), move=True)
        return
    keys = keyset.open()
    encrypted = directory.with_name(f"{directory.name}-encrypted")
    for name in list_files(directory):
        target = encrypted / f"{name}{SUFFIX}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            (directory / name).open("rb") as plain,
            target.open("wb") as file,
            keys.encrypting(file, bound_to(digest, name)) as stream,
        ):
            shutil.copyfileobj(plain, stream, _COPY_BYTES)
    (encrypted / ENCRYPTION).write_bytes(_describe(keys.primary_id))
    storage.put_dir(encrypted, package_key(digest), move=True)


def fetch(digest: str, storage: Storage, target: Path, keyset: Keyset | None) -> None:
    """Copy a package out of storage, decrypted, to `target`, which must not exist.

    Raises:
        NotFoundError: it is not there.
        DecryptionError: it is encrypted, and its key is not here.
        ChangedFileError: it was encrypted as something else.
    """
    key_id = encryption_key_of(digest, storage)
    if key_id is None:
        key_id = _fetch_plain(digest, storage, target)
    if key_id is not None:
        _fetch_encrypted(digest, storage, target, _keys_with(key_id, digest, keyset))


def encryption_key_of(digest: str, storage: Storage) -> int | None:
    """Id of the key that a stored package is encrypted with, None if it is plain.

    Raises:
        PackageError: what it says of its encryption makes no sense.
    """
    key = f"{package_key(digest)}/{ENCRYPTION}"
    if not storage.exists(key):
        return None
    try:
        values = json.loads(storage.read_bytes(key))
        version, algorithm, key_id = (
            values[name] for name in ("format_version", "algorithm", "key_id")
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        version, algorithm, key_id = None, None, None
    is_known = type(version) is int and (version, algorithm) == (_FORMAT_VERSION, ALGORITHM)
    if not is_known or type(key_id) is not int or key_id not in _KEY_IDS:
        raise DecryptionError(
            f"{ENCRYPTION} of package {digest} is not of format {_FORMAT_VERSION}, {ALGORITHM}",
            hint="upgrade Heliostat, or publish the package again",
        )
    return key_id


def sealed_with(digest: str, storage: Storage) -> int | None:
    """Id of the key that all of a stored package is encrypted with; None where any of it is plain,
    as after an encryption that was interrupted.

    Raises:
        PackageError: what it says of its encryption makes no sense.
    """
    key_id = encryption_key_of(digest, storage)
    is_whole = all(name.endswith(SUFFIX) or name == ENCRYPTION for name in _names(digest, storage))
    return key_id if is_whole else None


def reencrypt(digest: str, storage: Storage, keys: Keys) -> None:
    """Encrypt a stored package with the primary key, file by file and in place.

    It can be fetched at every moment, and who was interrupted may begin again.

    Raises:
        PackageError: it cannot be decrypted, or is not one.
    """
    place, names = package_key(digest), _names(digest, storage)
    was_encrypted = ENCRYPTION in names
    plain = [name for name in names if not name.endswith(SUFFIX) and name != ENCRYPTION]
    sealed = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
    if not was_encrypted:
        _refuse_unknown_key(digest, sealed, plain)
    with storage.staging() as stage:
        for name in sealed if was_encrypted else plain:
            _reencrypt_file(digest, name, storage, keys, stage, was_encrypted)
    # From here on readers look at the encrypted files, which are complete.
    storage.write_bytes(f"{place}/{ENCRYPTION}", _describe(keys.primary_id))
    for name in plain:
        storage.delete_file(f"{place}/{name}")


def _reencrypt_file(
    digest: str, name: str, storage: Storage, keys: Keys, stage: Path, was_encrypted: bool
) -> None:
    """No plain byte reaches a disk."""
    key, bound, sealed = f"{package_key(digest)}/{name}", bound_to(digest, name), stage / "sealed"
    with (
        storage.reading(key + SUFFIX if was_encrypted else key) as source,
        sealed.open("wb") as file,
        keys.encrypting(file, bound) as stream,
    ):
        if was_encrypted:
            keys.decrypt(source, stream, bound, name=name)
        else:
            shutil.copyfileobj(source, stream, _COPY_BYTES)
    storage.put_file(sealed, key + SUFFIX)


def _fetch_plain(digest: str, storage: Storage, target: Path) -> int | None:
    """Copy a plain package; the id of its key where it was encrypted meanwhile."""
    place = package_key(digest)
    local = storage.local_path(place)
    if local is not None and local.is_dir():
        # Refuse links and devices before copying them.
        _names(digest, storage)
    try:
        storage.get_dir(place, target)
    except NotFoundError:
        if (key_id := encryption_key_of(digest, storage)) is None:
            raise
        shutil.rmtree(target, ignore_errors=True)
        return key_id
    if (key_id := encryption_key_of(digest, storage)) is not None:
        shutil.rmtree(target)
        return key_id
    sealed = [*target.rglob(f"*{SUFFIX}")]
    plain = [path for path in target.rglob("*") if path.is_file()]
    _refuse_unknown_key(digest, [str(p).removesuffix(SUFFIX) for p in sealed], [*map(str, plain)])
    for path in sealed:
        # Of an encryption that was interrupted.
        path.unlink()
    return None


def _refuse_unknown_key(digest: str, sealed: Collection[str], plain: Collection[str]) -> None:
    """An encryption that was interrupted has all its plain files still.

    Where one is gone, nothing but the note could say which key opens the package.
    """
    if not set(sealed) <= set(plain):
        raise DecryptionError(
            f"package {digest} is encrypted, and its {ENCRYPTION} is missing",
            hint="restore that file, or publish the package again",
        )


def _fetch_encrypted(digest: str, storage: Storage, target: Path, keys: Keys) -> None:
    place = package_key(digest)
    if not storage.exists(place):
        raise NotFoundError(f"{storage.path(place)} does not exist", hint="check storage_url")
    stored = _names(digest, storage)
    names = [name.removesuffix(SUFFIX) for name in stored if name.endswith(SUFFIX)]
    _refuse_files_in_files(names)
    for name in names:
        plain = target / name
        plain.parent.mkdir(parents=True, exist_ok=True)
        with storage.reading(f"{place}/{name}{SUFFIX}") as source, plain.open("xb") as file:
            keys.decrypt(source, file, bound_to(digest, name), name=name)


def _refuse_files_in_files(names: Collection[str]) -> None:
    """Encrypted, a file and a directory of one name can lie side by side."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if both := sorted(folders & set(names)):
        raise ForbiddenFileError(
            f"'{both[0]}' is a file and a directory in the encrypted package",
            hint="publish the package again",
        )


def _keys_with(key_id: int, digest: str, keyset: Keyset | None) -> Keys:
    hint = "point HELIOSTAT_ENCRYPTION_KEYSET to the keyset of the installation that published it"
    if keyset is None or not keyset.path.exists():
        where = f"at {keyset.path}" if keyset else "here"
        raise DecryptionError(
            f"package {digest} is encrypted with key {key_id}, and there is no keyset {where}",
            hint=hint,
        )
    keys = keyset.open()
    if key_id not in keys.ids:
        raise DecryptionError(
            f"package {digest} is encrypted with key {key_id}, which {keyset.path} does not hold",
            hint=hint,
        )
    return keys


def _names(digest: str, storage: Storage) -> list[str]:
    """Paths of a stored package's files, as they lie there.

    Raises:
        ForbiddenFileError: one may not be there.
    """
    place = package_key(digest)
    local = storage.local_path(place)
    if local is not None:
        return list(list_files(local, check=_check_stored_name)) if local.is_dir() else []
    names = [key.removeprefix(f"{place}/") for key in storage.list(place)]
    return [_check_stored_name(name) for name in names]


def _check_stored_name(name: str) -> str:
    if name != ENCRYPTION:
        check_file_name(name.removesuffix(SUFFIX))
    return name


def _describe(key_id: int) -> bytes:
    values = {"format_version": _FORMAT_VERSION, "algorithm": ALGORITHM, "key_id": key_id}
    return json.dumps(values, sort_keys=True).encode()
