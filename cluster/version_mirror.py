"""Versions as MLflow shows them: numbered there, and each with its package's card, tags and run.

It gets MLflow's client, and imports nothing of it.

    number = number_version(client, "digits", published, run_id=None, taken={1, 2}, parent=None)
    forget_version(client, "digits", number)
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from cluster.model_package.card import CardLinks, model_card, version_tags
from cluster.model_package.manifest import package_key
from cluster.model_package.writer import PublishedPackage
from cluster.model_ref import ModelRef

DIGEST_TAG = "heliostat.digest"
RELEASE_TAG = "heliostat.release"
_MAX_TAG_CHARACTERS = 4500
"""MLflow stores 5000."""


def number_version(
    client: Any,
    name: str,
    published: PublishedPackage,
    *,
    run_id: str | None,
    taken: Set[int],
    parent: ModelRef | None,
) -> int:
    """The number MLflow has or gives for a package, none of those `taken` in SQL.

    Args:
        parent: the version that the package was derived from, if it is registered.
    """
    try:
        client.create_registered_model(name)
    except Exception as error:
        if not _is(error, "RESOURCE_ALREADY_EXISTS"):
            raise
    for found in client.search_model_versions(f"name = '{name}'"):
        # Left by a registration that was interrupted before SQL knew of it.
        if found.tags.get(DIGEST_TAG) == published.digest and int(found.version) not in taken:
            return int(found.version)
    links = CardLinks(run=_run_page(client, run_id), parent=_version_page(parent))
    while True:
        created = client.create_model_version(
            name,
            source=_source(published),
            run_id=run_id,
            tags=version_tags(published.digest, published.manifest, published.location),
            description=model_card(published.digest, published.manifest, links),
            await_creation_for=0,
        )
        if int(created.version) not in taken:
            return int(created.version)
        # MLflow counts from 1 again after the model was deleted in its UI.
        forget_version(client, name, int(created.version))


def forget_version(client: Any, name: str, version: int) -> None:
    """Remove a version from MLflow; one that somebody else removed before is no error."""
    try:
        client.delete_model_version(name, str(version))
    except Exception as error:
        if not _is(error, "RESOURCE_DOES_NOT_EXIST"):
            raise


def show_release(client: Any, name: str, version: int, text: str) -> None:
    """Say on a version's page what became of it, in place of what was said before."""
    client.set_model_version_tag(name, str(version), RELEASE_TAG, text[:_MAX_TAG_CHARACTERS])


def _is(error: Exception, code: str) -> bool:
    """Whether MLflow's server gave this reason."""
    return getattr(error, "error_code", "") == code


def _source(published: PublishedPackage) -> str:
    """MLflow refuses local paths as sources; the package's identity says as much."""
    if "://" in published.location:
        return published.location
    return f"heliostat://{package_key(published.digest)}"


def _run_page(client: Any, run_id: str | None) -> str:
    """Relative to the server, which people may reach under another name than this process."""
    if not run_id:
        return ""
    try:
        experiment_id = client.get_run(run_id).info.experiment_id
    except Exception as error:
        # A run that was deleted since: the version is registered without a link to it.
        if not _is(error, "RESOURCE_DOES_NOT_EXIST"):
            raise
        return ""
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def _version_page(version: ModelRef | None) -> str:
    return f"#/models/{version.name}/versions/{version.version}" if version else ""
