"""Packages with this machine's settings: what it trusts, what it signs with, what it opens.

The one place that knows which signer and which trust a machine has.

    package = open_version(registry.resolve(ModelRef.parse("digits")), settings)
    package = open_digest("sha256:…", settings)
    base = open_base(adapter, settings)
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from cluster.errors import NotFoundError, NotRunningError, PackageError
from cluster.model_package.encryption import Keyset
from cluster.model_package.manifest import package_key
from cluster.model_package.reader import ModelPackage, open_cached, open_package
from cluster.model_package.signing import LocalSigner, Signer, Trust, TrustStore
from cluster.settings import Settings
from cluster.storage import Storage

_logger = logging.getLogger(__name__)


class Version(Protocol):
    """A package under a name: a `ModelVersion`, a `ServedVersion`."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def digest(self) -> str: ...


def open_signer(settings: Settings) -> Signer:
    """What this machine signs packages with.

    Raises:
        NotRunningError: it has no key yet.
        RevokedKeyError: its key was revoked.
    """
    return LocalSigner(settings.keys_dir)


def open_trust(settings: Settings) -> Trust:
    """Whose packages this machine opens."""
    return TrustStore(settings.keys_dir)


def open_keyset(settings: Settings) -> Keyset:
    """What decrypts packages on this machine; the file may be absent."""
    path = settings.encryption_keyset
    return Keyset(Path(path) if path else settings.keys_dir / "encryption_keyset.json")


def encrypting_keyset(settings: Settings) -> Keyset | None:
    """What this machine encrypts packages with that it writes; None where that is off."""
    return open_keyset(settings) if settings.encrypt_packages else None


def open_version(version: Version, settings: Settings) -> ModelPackage:
    """Fetch, verify and cache the package of a version; see `open_package`."""
    try:
        return open_digest(version.digest, settings)
    except (NotFoundError, PackageError) as error:
        # Several packages are opened for one request: which of them is half the answer.
        label = f"{version.name}/{version.version}"
        raise type(error)(f"{label}: {error.message}", hint=error.hint) from None


def open_digest(digest: str, settings: Settings) -> ModelPackage:
    """Fetch, verify and cache a package; see `open_package`.

    While storage is down, this machine's copy is verified and used, and a warning says so.
    """
    try:
        storage = Storage.open(settings.storage_root)
        storage.require_root()
        storage.exists(package_key(digest))
    except NotRunningError as error:
        if (copy := open_copy(digest, settings)) is None:
            raise
        _logger.warning("%s; package %s is this machine's verified copy", error.message, digest)
        return copy
    return open_package(
        digest,
        storage=storage,
        trust=open_trust(settings),
        cache_dir=settings.package_cache_dir,
        allow_unsigned=settings.allow_unsigned,
        keyset=open_keyset(settings),
    )


def open_copy(digest: str, settings: Settings) -> ModelPackage | None:
    """This machine's copy of a package, without asking storage; see `open_cached`."""
    return open_cached(
        digest,
        trust=open_trust(settings),
        cache_dir=settings.package_cache_dir,
        allow_unsigned=settings.allow_unsigned,
    )


def open_base(adapter: ModelPackage, settings: Settings) -> ModelPackage:
    """Fetch, verify and cache the package that an adapter was trained on.

    Raises:
        NotFoundError: it is not in storage.
        PackageError: it cannot be trusted, or is no language model.
    """
    info = adapter.manifest.adapter
    assert info is not None, "a verified adapter names its base"
    try:
        base = open_digest(info.base_digest, settings)
    except NotFoundError as error:
        raise NotFoundError(
            f"the base of adapter {adapter.digest} is not there: {error.message}",
            hint="publish the base again, or merge the adapter where the base is",
        ) from None
    if base.manifest.kind != "language_model":
        raise PackageError(
            f"the base of adapter {adapter.digest} is of kind '{base.manifest.kind}', expected "
            "'language_model'",
            hint="train the adapter on a language model",
        )
    return base
