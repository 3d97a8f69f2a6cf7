"""Where a verified package came from, link by link, each held against what this machine can see.

The signature covers the manifest, the manifest names its dataset by a digest, and that one covers
the digest of every file of the data: so no link can be exchanged unnoticed. Nothing is asked of
MLflow. What is not here is said to be absent; what has changed is an error.

    for link in trace(package, settings): print(link.what, link.identity, link.state, link.note)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import ChangedFileError, NotFoundError, NotRunningError, PackageError
from cluster.model_package import ModelPackage, open_digest
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.submission import has_commit

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_COMMIT = re.compile(r"([0-9a-f]{40})(-dirty)?", re.ASCII)
_DATASETS, _DESCRIPTION = "datasets", "dataset.json"
_CHUNK_BYTES = 1024**2


@dataclass(frozen=True)
class Link:
    """One thing that a package came from."""

    what: Literal["package", "dataset", "commit", "run", "parent"]
    identity: str
    """Its digest, commit or run id; empty where the manifest names none."""
    state: Literal["verified", "absent", "recorded", "unknown"]
    """`verified`: read here, and it is what the manifest says. `absent`: it is not here to be read.
    `recorded`: the signed manifest says so, and there is nothing to hold against it. `unknown`: the
    manifest does not say."""
    note: str
    """What was checked, or why it could not be."""
    depth: int = 0
    """Parents between it and the package that was asked about."""


def trace(package: ModelPackage, settings: Settings, *, with_data: bool = True) -> Iterator[Link]:
    """The package, its dataset, commit and run, then those of its parent, and so on.

    Args:
        package: as its reader gave it, so verified.
        with_data: read every file of the datasets; else only their description.

    Raises:
        ChangedFileError: a dataset is not the one that was trained on.
        PackageError: a parent cannot be trusted; the class says why.
    """
    yield _package_link("package", package, 0)
    yield from _origins(package, settings, with_data, 0)


def _origins(
    package: ModelPackage, settings: Settings, with_data: bool, depth: int
) -> Iterator[Link]:
    lineage = package.manifest.lineage
    yield _dataset_link(lineage.dataset_digest, settings, with_data, depth)
    yield _commit_link(lineage.git_commit, settings, depth)
    if lineage.run_id:
        yield Link("run", lineage.run_id, "recorded", lineage.source, depth)
    if not lineage.parent_digest:
        return
    try:
        parent = open_digest(lineage.parent_digest, settings)
    except (NotFoundError, NotRunningError) as error:
        yield Link("parent", lineage.parent_digest, "absent", error.message, depth)
        return
    except PackageError as error:
        raise type(error)(
            f"parent {lineage.parent_digest}: {error.message}", hint=error.hint
        ) from None
    yield _package_link("parent", parent, depth)
    yield from _origins(parent, settings, with_data, depth + 1)


def _package_link(what: Literal["package", "parent"], package: ModelPackage, depth: int) -> Link:
    signer = f"signed by key {package.signer[:12]}" if package.signer else "unsigned"
    note = f"{package.manifest.name}, {package.manifest.kind}, {signer}"
    return Link(what, package.digest, "verified", note, depth)


def _commit_link(commit: str, settings: Settings, depth: int) -> Link:
    match = _COMMIT.fullmatch(commit)
    if match is None:
        return Link("commit", commit, "unknown", "the manifest names none", depth)
    if not has_commit(settings.source_dir, match[1]):
        return Link("commit", commit, "absent", "not in this checkout", depth)
    if match[2]:
        return Link("commit", commit, "recorded", "with changes that were not committed", depth)
    return Link("commit", commit, "verified", "in this checkout", depth)


def _dataset_link(digest: str, settings: Settings, with_data: bool, depth: int) -> Link:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        return Link("dataset", digest, "unknown", "the manifest names none", depth)
    try:
        storage = Storage.open(settings.storage_root)
        storage.require_root()
        directory = _find_dataset(storage, match[1])
        note = _verify_dataset(storage, directory, digest, with_data)
    except (NotFoundError, NotRunningError) as error:
        return Link("dataset", digest, "absent", error.message, depth)
    return Link("dataset", digest, "verified", note, depth)


def _find_dataset(storage: Storage, name: str) -> str:
    ending = f"/{name}/{_DESCRIPTION}"
    for key in storage.list(_DATASETS):
        if key.endswith(ending):
            return key.removesuffix(f"/{_DESCRIPTION}")
    raise NotFoundError(f"not in {storage.root}")


def _verify_dataset(storage: Storage, directory: str, digest: str, with_data: bool) -> str:
    """Hold a dataset's description against its digest, and its files against the description."""
    key = f"{directory}/{_DESCRIPTION}"
    description = _parse(storage.read_bytes(key))
    if _canonical_digest(description) != digest:
        raise _changed(storage.path(key))
    files: dict[str, dict[str, Any]] = description["files"]
    size_bytes = sum(file["size_bytes"] for file in files.values())
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    shown = f"{description['name']}, {count}, {size_bytes / 1e6:,.1f} MB"
    if not with_data:
        return f"{shown}, not read"
    for name, expected in files.items():
        if _hash(storage, f"{directory}/{name}") != expected["sha256"]:
            raise _changed(storage.path(f"{directory}/{name}"))
    return shown


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _canonical_digest(description: Any) -> str:
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _hash(storage: Storage, key: str) -> str:
    """SHA-256 of a stored file; empty if it is not there."""
    found = hashlib.sha256()
    try:
        with storage.reading(key) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                found.update(chunk)
    except NotFoundError:
        return ""
    return found.hexdigest()


def _changed(path: str) -> ChangedFileError:
    return ChangedFileError(
        f"'{path}' is not what the model was trained on: it is missing or has changed",
        hint="restore the dataset from a backup, or prepare it again from its source",
    )
