"""Open a model package: verify first, parse afterwards, from a cache that only this module writes.

The order is the security of it: list the files without opening any; check the signature over their
bytes; check that the manifest is the one asked for; only then parse it, and hold the files against
it. What is opened is a private copy, so nothing can change between the check and the use.

    package = open_package(digest, storage=storage, trust=TrustStore(keys_dir), cache_dir=cache)
    runtime = OnnxRuntime(package.graph_path)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import (
    ChangedFileError,
    MachineError,
    MissingFileError,
    NotFoundError,
    PackageError,
    RevokedKeyError,
    UnknownKeyError,
)
from cluster.model_package.encryption import Keyset
from cluster.model_package.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GRAPH,
    MANIFEST,
    MODEL_DIR,
    SIGNATURE,
    TOKENIZER,
    list_files,
    refuse_code_references,
)
from cluster.model_package.hashing import sha256_files
from cluster.model_package.manifest import Kind, Manifest, digest_of, package_key
from cluster.model_package.signing import Trust, difference
from cluster.model_package.stored import fetch
from cluster.storage import Storage

MAX_MANIFEST_BYTES = 64 * 1024**2

_NEEDED: dict[Kind, tuple[str, ...]] = {
    "graph": (GRAPH,),
    "language_model": ("config.json",),
    "adapter": (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER),
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPackage:
    """A verified package on this machine."""

    path: Path
    manifest: Manifest
    digest: str
    """Its identity: the SHA-256 of the manifest's bytes."""
    signer: str | None
    """Fingerprint of the key that signed it; None where unsigned packages are allowed."""

    @property
    def model_dir(self) -> Path:
        """A Hugging Face directory for a language model, a peft directory for an adapter."""
        return self.path / MODEL_DIR

    @property
    def graph_path(self) -> Path:
        """The ONNX file of a graph."""
        return self.path / MODEL_DIR / GRAPH


def open_package(
    digest: str,
    *,
    storage: Storage,
    trust: Trust,
    cache_dir: Path,
    allow_unsigned: bool = False,
    keyset: Keyset | None = None,
) -> ModelPackage:
    """Fetch, decrypt, verify and cache the package with this digest.

    A cached copy is verified in full again: hashing takes 0.6 s of a core for 1 GB,
    and a cache that was tampered with is noticed, dropped and fetched anew.

    Args:
        keyset: what decrypts it where it is encrypted at rest.

    Raises:
        NotFoundError: no such package in storage.
        PackageError: it cannot be trusted or decrypted; the class says why.
    """
    cached = open_cached(digest, trust=trust, cache_dir=cache_dir, allow_unsigned=allow_unsigned)
    if cached is not None:
        return cached
    entry = _entry(digest, cache_dir)
    with fetched(digest, storage, cache_dir, keyset) as incoming:
        package = verify_directory(incoming, trust, digest=digest, allow_unsigned=allow_unsigned)
        for name in list_files(incoming):
            (incoming / name).chmod(0o444)
        # Fails if another process was faster; its copy is verified like any other.
        with contextlib.suppress(OSError):
            incoming.rename(entry)
            return dataclasses.replace(package, path=entry)
    return verify_directory(entry, trust, digest=digest, allow_unsigned=allow_unsigned)


def open_cached(
    digest: str, *, trust: Trust, cache_dir: Path, allow_unsigned: bool = False
) -> ModelPackage | None:
    """This machine's copy of a package, verified in full again; None if there is none to trust.

    Raises:
        UnknownKeyError: it is whole, and signed by a key that is not trusted here.
    """
    entry = _entry(digest, cache_dir)
    if not os.path.lexists(entry):
        return None
    if entry.is_symlink() or not entry.is_dir():
        _logger.warning("cached package %s is no directory, and is fetched again", digest)
        _discard(entry)
        return None
    try:
        return verify_directory(entry, trust, digest=digest, allow_unsigned=allow_unsigned)
    except (UnknownKeyError, RevokedKeyError):
        raise
    except PackageError as error:
        _logger.warning("cached package %s is dropped, to be fetched again: %s", digest, error)
        _discard(entry)
        return None


def _entry(digest: str, cache_dir: Path) -> Path:
    return cache_dir / package_key(digest).rpartition("/")[2]


@contextlib.contextmanager
def fetched(
    digest: str, storage: Storage, cache_dir: Path, keyset: Keyset | None = None
) -> Iterator[Path]:
    """An unverified private copy of a stored package, decrypted, gone at the end."""
    key = package_key(digest)
    _make_private(cache_dir)
    parent = Path(tempfile.mkdtemp(prefix=".incoming-", dir=cache_dir))
    try:
        try:
            fetch(digest, storage, parent / "package", keyset)
        except NotFoundError:
            raise NotFoundError(
                f"package {digest} is not in storage ({storage.path(key)})",
                hint="check HELIOSTAT_STORAGE_URL, or publish it again",
            ) from None
        yield parent / "package"
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def verify_directory(
    directory: Path, trust: Trust, *, digest: str | None = None, allow_unsigned: bool = False
) -> ModelPackage:
    """Verify a package where it lies; safe to use only if nobody else writes there.

    Args:
        digest: the identity asked for; None accepts whichever it has.

    Raises:
        PackageError: the class says what is wrong.
    """
    sizes = list_files(directory)
    if MANIFEST not in sizes:
        raise MissingFileError(
            f"{MANIFEST} is missing in {directory}", hint="point to a package's own directory"
        )
    if sizes[MANIFEST] > MAX_MANIFEST_BYTES:
        raise PackageError(f"{MANIFEST} has {sizes[MANIFEST]} bytes", hint="publish it again")
    signer, digests = _check_bytes(directory, sizes, trust, allow_unsigned)
    data = (directory / MANIFEST).read_bytes()
    found = digest_of(data)
    if digests[MANIFEST] != found.removeprefix("sha256:") or (digest or found) != found:
        raise ChangedFileError(
            f"{MANIFEST} has digest {found}, expected {digest or digests[MANIFEST]}",
            hint="this is another package; fetch it again",
        )
    manifest = Manifest.from_bytes(data)
    _check_declared(manifest, digests)
    refuse_code_references(directory, list(manifest.files))
    return ModelPackage(directory, manifest, found, signer)


def _check_bytes(
    directory: Path, sizes: dict[str, int], trust: Trust, allow_unsigned: bool
) -> tuple[str | None, dict[str, str]]:
    if SIGNATURE in sizes or not allow_unsigned:
        verified = trust.verify(directory)
        return verified.fingerprint, verified.digests
    digests = sha256_files(directory / name for name in sizes)
    return None, {path.relative_to(directory).as_posix(): sha for path, sha in digests.items()}


def _check_declared(manifest: Manifest, digests: dict[str, str]) -> None:
    declared = {name: entry.sha256 for name, entry in manifest.files.items()}
    actual = {name: value for name, value in digests.items() if name != MANIFEST}
    if declared != actual:
        raise difference(declared, actual)
    for wanted in (f"{MODEL_DIR}/{name}" for name in _NEEDED[manifest.kind]):
        if wanted not in declared:
            raise MissingFileError(
                f"file '{wanted}' is missing, a {manifest.kind} package needs it",
                hint="publish again",
            )
    if (manifest.kind == "adapter") != (manifest.adapter is not None):
        raise PackageError(
            f"manifest.json: 'adapter' does not fit kind '{manifest.kind}'", hint="publish again"
        )


def _make_private(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        cache_dir.chmod(0o700)
    except OSError as error:
        raise MachineError(
            f"package cache {cache_dir} cannot be used: {error.strerror}",
            hint="check HELIOSTAT_HOME and its permissions",
        ) from None


def _discard(entry: Path) -> None:
    """Take a cache entry away in one step; who has its files open keeps them."""
    aside = Path(tempfile.mkdtemp(prefix=".discarded-", dir=entry.parent))
    with contextlib.suppress(OSError):
        entry.rename(aside / "package")
    shutil.rmtree(aside, ignore_errors=True)
