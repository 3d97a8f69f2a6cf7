"""Open what the registry names, with this machine's settings.

Knows of a version only its digest.

    package = open_version(registry.resolve(ModelRef.parse("digits")), settings)
"""

from __future__ import annotations

from typing import Protocol

from cluster.model_package.reader import ModelPackage, open_package
from cluster.model_package.signing import TrustStore
from cluster.settings import Settings
from cluster.storage import Storage


class HasDigest(Protocol):
    """Anything that names a package: a `ModelVersion`, a `PublishedPackage`."""

    @property
    def digest(self) -> str: ...


def open_version(version: HasDigest, settings: Settings) -> ModelPackage:
    """Fetch, verify and cache the package of a version; see `open_package`."""
    return open_package(
        version.digest,
        storage=Storage.open(settings.storage_root),
        trust=TrustStore(settings.keys_dir),
        cache_dir=settings.package_cache_dir,
        allow_unsigned=settings.allow_unsigned,
    )
