"""OpenSSF model signatures: make them with a local key, check them against trusted keys.

A signature covers every file of a directory but itself. Where keys lie is not known here but in
`cluster.model_package.keys`; nothing is known of manifests. The library is imported on first use,
because that takes 0.4 s.

    LocalSigner(settings.keys_dir).sign(directory)
    verified = TrustStore(settings.keys_dir).verify(directory)   # fingerprint, digests by file
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import (
    ChangedFileError,
    ExtraFileError,
    ForbiddenFileError,
    MissingFileError,
    SignatureError,
    TamperedPackageError,
)
from cluster.model_package.files import SIGNATURE
from cluster.model_package.hashing import sha256_files
from cluster.model_package.keys import SigningKeys

MAX_SIGNATURE_BYTES = 16 * 1024**2

_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Signer(Protocol):
    """Signs directories in somebody's name: with a key file, a certificate or a KMS."""

    @property
    def fingerprint(self) -> str:
        """Of the key."""
        ...

    def sign(self, directory: Path) -> None:
        """Write `signature.json` over all other files of `directory`."""
        ...


@dataclass(frozen=True)
class VerifiedSignature:
    """A signature that holds: who signed, and the SHA-256 of each file (in hexadecimal)."""

    fingerprint: str
    digests: dict[str, str]


class Trust(Protocol):
    """Decides whose signature counts."""

    def verify(self, directory: Path) -> VerifiedSignature:
        """Check the signature and every file under it; no file but the signature is parsed.

        Raises:
            SignatureError: there is none, it does not hold, or its maker is not trusted.
            TamperedPackageError: it holds, but the files are not those that were signed.
        """
        ...


class LocalSigner:
    """Signs with the local key of a directory, whichever that is by then.

    Raises:
        NotRunningError: there is no key yet.
        SignatureError: it cannot be read, or is not EC P-256.
        RevokedKeyError: it may sign no more; `sign` and `fingerprint` look again.
    """

    def __init__(self, keys_dir: Path) -> None:
        self._keys = SigningKeys(keys_dir)
        self._keys.local()

    @property
    def fingerprint(self) -> str:
        return self._keys.local()

    def sign(self, directory: Path) -> None:
        from model_signing import signing

        self._keys.local()
        config = signing.Config().use_elliptic_key_signer(private_key=self._keys.private_key)
        config.set_hashing_config(_hashing_config()).sign(directory, directory / SIGNATURE)
        # Hashing takes a while, in which the key may be revoked.
        self._keys.public_key(_named_key(_read_bundle(directory)))


class TrustStore:
    """Trusts the public keys of a directory, see `cluster.model_package.keys`."""

    def __init__(self, keys_dir: Path) -> None:
        self._keys = SigningKeys(keys_dir)

    def fingerprints(self) -> list[str]:
        """Every key that may sign."""
        return [key.fingerprint for key in self._keys.known() if key.state == "trusted"]

    def verify(self, directory: Path) -> VerifiedSignature:
        """See `Trust`.

        Raises:
            UnknownKeyError: it was made with a key that is not trusted here.
            RevokedKeyError: it was made with a key that no longer is.
        """
        bundle = _read_bundle(directory)
        fingerprint = _named_key(bundle)
        public_key = self._keys.public_key(fingerprint)
        return VerifiedSignature(fingerprint, _verify(directory, public_key, bundle))


def _verify(directory: Path, public_key: Path, bundle: dict[str, Any]) -> dict[str, str]:
    from model_signing import verifying

    hashing = _hashing_config()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(hashing).verify(directory, directory / SIGNATURE)
    # The library raises ValueError, KeyError, InvalidSignature, RecursionError and more on bad
    # signatures. It hashes files only after the signature itself was found good.
    except Exception as error:
        if hashing.found is None:
            raise SignatureError(
                f"the signature does not verify ({type(error).__name__})",
                hint="fetch the package again from where it was published",
            ) from None
        raise _describe_difference(bundle, _digests(hashing.found)) from None
    return _digests(hashing.found)


def _hashing_config() -> Any:
    from model_signing import hashing

    class RecordingConfig(hashing.Config):  # type: ignore[misc]
        """Hashes every file but the signature, and keeps what it found."""

        found: Any = None

        def hash(self, model_path: Path, *, files_to_hash: Any = None) -> Any:
            empty = super().hash(model_path, files_to_hash=())
            self.found = _hashed(model_path, empty)
            return self.found

        def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
            """What is looked at is fixed by the format; a signature cannot narrow it."""

    config = RecordingConfig().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _hashed(directory: Path, empty: Any) -> Any:
    """The library's manifest of a directory, made of our own digests, which read ahead."""
    from model_signing import manifest
    from model_signing._hashing.hashing import Digest

    digests = sha256_files(_signed_files(directory))
    form = manifest.SerializationType.from_args(empty.serialization_type)
    items = [
        form.new_item(
            path.relative_to(directory).as_posix(), Digest("sha256", bytes.fromhex(digest))
        )
        for path, digest in digests.items()
    ]
    return manifest.Manifest(empty.model_name, items, form)


def _signed_files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        if path.is_symlink():
            raise ForbiddenFileError(f"'{path.name}' is a link, expected a plain file")
        if path.is_file() and path != directory / SIGNATURE:
            yield path


def _digests(found: Any) -> dict[str, str]:
    return {item.identifier: item.digest.digest_hex for item in found.resource_descriptors()}


def _describe_difference(bundle: dict[str, Any], actual: dict[str, str]) -> TamperedPackageError:
    """Only for a bundle whose signature holds: its payload is the signer's word."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
    return difference(signed, actual)


def difference(expected: dict[str, str], actual: dict[str, str]) -> TamperedPackageError:
    """The error for files that are not the expected ones; digests by name, not all equal."""
    hint = "fetch the package again from where it was published"
    if extra := sorted(actual.keys() - expected.keys()):
        return ExtraFileError(f"file '{extra[0]}' is not part of the package", hint=hint)
    if missing := sorted(expected.keys() - actual.keys()):
        return MissingFileError(f"file '{missing[0]}' of the package is missing", hint=hint)
    changed = sorted(name for name in expected if expected[name] != actual[name])
    return ChangedFileError(
        f"file '{changed[0] if changed else SIGNATURE}' is not the one that was published",
        hint=hint,
    )


def _read_bundle(directory: Path) -> dict[str, Any]:
    path = directory / SIGNATURE
    hint = "publish it with a signing key, or set HELIOSTAT_ALLOW_UNSIGNED=true to experiment"
    if not path.is_file():
        raise SignatureError("the package is not signed", hint=hint)
    if path.stat().st_size > MAX_SIGNATURE_BYTES:
        raise SignatureError(f"{SIGNATURE} is larger than {MAX_SIGNATURE_BYTES} bytes", hint=hint)
    try:
        bundle = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        bundle = None
    if not isinstance(bundle, dict):
        raise SignatureError(f"{SIGNATURE} is not a Sigstore bundle", hint=hint)
    return bundle


def _named_key(bundle: dict[str, Any]) -> str:
    try:
        fingerprint = bundle["verificationMaterial"]["publicKey"]["hint"]
    except (KeyError, TypeError):
        fingerprint = None
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        raise SignatureError(
            f"{SIGNATURE} names no key", hint="sign it with an EC key of model-signing 1.1 or newer"
        )
    return fingerprint
