"""Signing keys as text: PEM, and the fingerprint that names a key.

Knows nothing of where keys lie. The library is imported on first use.

    fingerprint_of(public_pem(Path("keys/signing_key.pem")))     # 64 hexadecimal digits
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from cluster.errors import InputError, NotRunningError, SignatureError

_MAX_PEM_BYTES = 64 * 1024


def fingerprint_of(public: bytes) -> str:
    """The name of a public key in PEM."""
    return hashlib.sha256(public).hexdigest()


def public_pem(private_key: Path) -> bytes:
    """The public half of a private key in a PEM file.

    Raises:
        NotRunningError: there is no such file.
        SignatureError: it cannot be read, or is not EC P-256.
    """
    from cryptography.hazmat.primitives import serialization

    hint = "restore it, or move it away and run `heliostat up`"
    try:
        key = serialization.load_pem_private_key(_read_plain(private_key), None)
    except FileNotFoundError:
        raise NotRunningError(
            f"there is no signing key at {private_key}", hint="run `heliostat up` first"
        ) from None
    # Depending on what is wrong also UnsupportedAlgorithm, which is no ValueError.
    except Exception as error:
        raise SignatureError(
            f"signing key {private_key} cannot be read ({type(error).__name__})", hint=hint
        ) from None
    public: Any = key.public_key()
    if not _is_p256(public):
        raise SignatureError(
            f"signing key {private_key} is not of the kind EC P-256, expected that", hint=hint
        )
    return _to_pem(public)


def read_pem(path: Path) -> bytes:
    """A plain file that may be a key. Raises InputError."""
    try:
        return _read_plain(path)
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be read: {error.strerror}", hint="give the PEM file of a public key"
        ) from None


def _read_plain(path: Path) -> bytes:
    """Does not wait for whoever writes into a pipe."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        return file.read(_MAX_PEM_BYTES)


def normalised_pem(pem: bytes) -> bytes:
    """One spelling of each key, because the fingerprint is of the text."""
    from cryptography.hazmat.primitives import serialization

    if b"PRIVATE KEY" in pem:
        raise InputError(
            "this is a private key", hint="give the file that lies in keys/trusted beside it"
        )
    try:
        key: Any = serialization.load_pem_public_key(pem)
    # Depending on what is wrong also UnsupportedAlgorithm, which is no ValueError.
    except Exception:
        key = None
    if not _is_p256(key):
        raise InputError(
            "this is no public key of the kind EC P-256",
            hint="give a PEM file that begins with BEGIN PUBLIC KEY",
        )
    return _to_pem(key)


def _is_p256(key: Any) -> bool:
    from cryptography.hazmat.primitives.asymmetric import ec

    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _to_pem(public_key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    pem: bytes = public_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def new_private_pem() -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
