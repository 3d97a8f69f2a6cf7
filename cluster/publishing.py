"""What a job or an import has packaged becomes a version and its name's candidate, or goes again.

It knows nothing of how packages are made.

    require_publishing(settings)      # before the long work
    version = register_candidate(
        name, published, settings, run_id=run_id, actor="jobs.export", reason="merged"
    )
"""

from __future__ import annotations

import contextlib

import sqlalchemy as sa

from cluster.errors import HeliostatError
from cluster.model_package import PublishedPackage, encrypting_keyset, open_signer, package_key
from cluster.model_ref import CANDIDATE
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import require_server


def require_publishing(settings: Settings) -> None:
    """Find out before the work whether what comes of it could be signed, encrypted and registered.

    Raises:
        NotRunningError: the MLflow server or storage does not answer, or there is no signing key or
            keyset.
        PackageError: the key was revoked, or one of the two cannot be read.
    """
    require_server(settings)
    storage = Storage.open(settings.storage_root)
    # A folder is made by the first who writes there.
    if not storage.is_folder:
        storage.require_root()
    open_signer(settings)
    if (keyset := encrypting_keyset(settings)) is not None:
        keyset.open()


def register_candidate(
    name: str,
    published: PublishedPackage,
    settings: Settings,
    *,
    run_id: str | None = None,
    actor: str,
    reason: str,
) -> ModelVersion:
    """List a package under a name and make it the candidate; if it cannot be listed, remove it.

    Raises:
        NotRunningError: MLflow or storage does not answer.
        ConflictError: the package was removed as garbage meanwhile.
    """
    registry = ModelRegistry.open(settings)
    try:
        version = registry.register(name, published, run_id=run_id)
    # Also where it is stopped in the middle.
    except BaseException:
        # What cannot be removed now is left to `heliostat gc`.
        with contextlib.suppress(HeliostatError, sa.exc.SQLAlchemyError):
            # Unless it was listed before something else went wrong.
            if all(listed.digest != published.digest for listed in registry.list_versions()):
                Storage.open(settings.storage_root).delete_dir(package_key(published.digest))
        raise
    registry.set_alias(name, CANDIDATE, version.version, actor=actor, reason=reason)
    return registry.resolve(version.ref)
