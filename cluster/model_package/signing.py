"""OpenSSF model signatures: make them with a local key, check them against trusted keys.

A signature covers every file of a directory but itself. A key is named by its fingerprint, the
SHA-256 of its public half in PEM. Knows nothing of manifests. The library is imported on first use,
because that takes 0.4 s.

    fingerprint = ensure_local_key(settings.keys_dir)
    LocalSigner(settings.keys_dir).sign(directory)
    verified = TrustStore(settings.keys_dir).verify(directory)   # fingerprint, digests by file
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import (
    ChangedFileError,
    ExtraFileError,
    MachineError,
    MissingFileError,
    NotRunningError,
    SignatureError,
    TamperedPackageError,
    UnknownKeyError,
)
from cluster.model_package.files import SIGNATURE

PRIVATE_KEY = "signing_key.pem"
TRUSTED = "trusted"
MAX_SIGNATURE_BYTES = 16 * 1024**2

_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Signer(Protocol):
    """Signs directories in somebody's name."""

    @property
    def fingerprint(self) -> str: ...

    def sign(self, directory: Path) -> None:
        """Write `signature.json` over all other files of `directory`."""
        ...


@dataclass(frozen=True)
class VerifiedSignature:
    """A signature that holds: who signed, and the SHA-256 of each file (in hexadecimal)."""

    fingerprint: str
    digests: dict[str, str]


def ensure_local_key(keys_dir: Path) -> str:
    """Make the local EC P-256 key and trust it, if that was not done before; its fingerprint.

    Safe to call from several processes at once: all get the same key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    trusted_dir = keys_dir / TRUSTED
    try:
        trusted_dir.mkdir(parents=True, exist_ok=True)
        keys_dir.chmod(0o700)
    except OSError as error:
        raise MachineError(
            f"key directory {keys_dir} cannot be made: {error.strerror}",
            hint="check HELIOSTAT_HOME and its permissions",
        ) from None
    path = keys_dir / PRIVATE_KEY
    if not path.exists():
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        with _temporary_file(keys_dir, pem) as temporary, contextlib.suppress(FileExistsError):
            # A link, not a rename: the first process wins, the others use its key.
            os.link(temporary, path)
    public = _public_pem(path)
    fingerprint = hashlib.sha256(public).hexdigest()
    target = trusted_dir / f"{fingerprint}.pub"
    if not target.exists():
        with _temporary_file(trusted_dir, public) as temporary:
            temporary.chmod(0o644)
            temporary.replace(target)
    return fingerprint


class LocalSigner:
    """Signs with the key that `ensure_local_key` made.

    Raises:
        NotRunningError: there is no key yet.
    """

    def __init__(self, keys_dir: Path) -> None:
        self._path = keys_dir / PRIVATE_KEY
        self.fingerprint = hashlib.sha256(_public_pem(self._path)).hexdigest()

    def sign(self, directory: Path) -> None:
        from model_signing import signing

        config = signing.Config().use_elliptic_key_signer(private_key=self._path)
        config.set_hashing_config(_hashing_config()).sign(directory, directory / SIGNATURE)


class TrustStore:
    """The public keys in `KEYS_DIR/trusted/FINGERPRINT.pub`; put one there to trust it."""

    def __init__(self, keys_dir: Path) -> None:
        self._directory = keys_dir / TRUSTED

    def fingerprints(self) -> list[str]:
        """Every trusted key."""
        return sorted(path.stem for path in self._directory.glob("*.pub"))

    def verify(self, directory: Path) -> VerifiedSignature:
        """Check the signature and every file under it; no file but the signature is parsed.

        Raises:
            SignatureError: there is none, or it does not hold.
            UnknownKeyError: it was made with a key that is not trusted here.
            TamperedPackageError: it holds, but the files are not those that were signed.
        """
        bundle = _read_bundle(directory)
        fingerprint = _named_key(bundle)
        public_key = self._directory / f"{fingerprint}.pub"
        if not public_key.is_file():
            raise UnknownKeyError(
                f"signed by key {fingerprint}, which is not trusted here",
                hint=f"if you trust its owner, put the public key into {public_key}",
            )
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
            self.found = super().hash(model_path, files_to_hash=files_to_hash)
            return self.found

        def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
            """What is looked at is fixed by the format; a signature cannot narrow it."""

    config = RecordingConfig().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


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


def _public_pem(private_key: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(private_key.read_bytes(), None)
    except FileNotFoundError:
        raise NotRunningError(
            f"there is no signing key at {private_key}", hint="run `heliostat up` first"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise SignatureError(
            f"signing key {private_key} cannot be read ({type(error).__name__})",
            hint="restore it, or move it away and run `heliostat up`",
        ) from None
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@contextlib.contextmanager
def _temporary_file(directory: Path, data: bytes) -> Any:
    """A file of mode 0600 with `data`, removed at the end unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".new-")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
