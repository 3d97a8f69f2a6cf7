"""Signing keys as files: this machine's own, those that may sign, those that may no more.

    KEYS_DIR/signing_key.pem              the local private key, mode 0600
    KEYS_DIR/trusted/FINGERPRINT.pub      a public key that may sign; no other may
    KEYS_DIR/trusted/FINGERPRINT.revoked  it may not, whatever else lies here: when and why

A key is named by its fingerprint, the SHA-256 of its public half in PEM. Nothing is remembered
between calls, so all that share the directory see a change at once.

    keys = SigningKeys(settings.keys_dir)
    keys.revoke(keys.find("439d611c"), reason="its laptop was stolen")
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cluster.errors import (
    ConflictError,
    MachineError,
    NotFoundError,
    NotRunningError,
    RevokedKeyError,
    SignatureError,
    UnknownKeyError,
    UsageError,
    as_machine_error,
)
from cluster.model_package.pem import (
    fingerprint_of,
    new_private_pem,
    normalised_pem,
    public_pem,
)

PRIVATE_KEY = "signing_key.pem"
TRUSTED = "trusted"

_NEW = ".new-"
_ABANDONED_S = 3600
_MIN_PREFIX = 8
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class SigningKey:
    """A key that this machine knows."""

    fingerprint: str
    state: Literal["trusted", "revoked"]
    is_local: bool
    """Whether this machine signs with it."""
    note: str
    """Of a revoked key: when and why."""


class SigningKeys:
    """The keys in one directory, made when first needed."""

    def __init__(self, keys_dir: Path) -> None:
        self._directory = keys_dir
        self._trusted = keys_dir / TRUSTED
        self.private_key = keys_dir / PRIVATE_KEY

    def ensure_local(self) -> str:
        """Make the local EC P-256 key and trust it, if that was not done before; its fingerprint.

        Safe to call from several processes at once: all get the same key.
        """
        self._make_directory()
        if not self.private_key.exists():
            with (
                private_file(self._directory, new_private_pem()) as temporary,
                contextlib.suppress(FileExistsError),
            ):
                # A link, not a rename: the first process wins, the others use its key.
                os.link(temporary, self.private_key)
        public = public_pem(self.private_key)
        self._write_public(public)
        return fingerprint_of(public)

    def rotate_local(self) -> str:
        """Sign with a fresh key from now on; the old one stays trusted, its private half is gone.

        Raises:
            MachineError: the directory cannot be written to.
        """
        self._make_directory()
        try:
            with private_file(self._directory, new_private_pem()) as temporary:
                public = public_pem(temporary)
                # Trusted first: nothing may be signed with a key that is not.
                self._write_public(public)
                temporary.replace(self.private_key)
        except OSError as error:
            raise (as_machine_error(error) or error) from None
        return fingerprint_of(public)

    def local(self) -> str:
        """Fingerprint of the local key.

        Raises:
            NotRunningError: there is none yet.
            RevokedKeyError: it may sign no more.
        """
        fingerprint = fingerprint_of(public_pem(self.private_key))
        if self._mark(fingerprint).exists():
            raise RevokedKeyError(
                f"this machine's signing key {fingerprint} was revoked{self._note(fingerprint)}",
                hint="make a new one: `heliostat models keys rotate`",
            )
        return fingerprint

    def trust(self, pem: bytes) -> str:
        """Let an EC P-256 key sign; its fingerprint.

        Raises:
            InputError: `pem` is no such public key.
            ConflictError: it was revoked, which is for ever.
        """
        public = normalised_pem(pem)
        fingerprint = fingerprint_of(public)
        if self._mark(fingerprint).exists():
            raise ConflictError(
                f"key {fingerprint} was revoked{self._note(fingerprint)}",
                hint="let its owner make a new one: `heliostat models keys rotate`",
            )
        self._make_directory()
        self._write_public(public)
        return fingerprint

    def revoke(self, fingerprint: str, *, reason: str) -> None:
        """Refuse whatever the key signed, for ever; once more is no error. It need not be known.

        Raises:
            MachineError: the directory cannot be written to.
        """
        assert _FINGERPRINT.fullmatch(fingerprint), "find() gives fingerprints"
        self._make_directory()
        note = f"{datetime.now(UTC).isoformat(timespec='seconds')} {' '.join(reason.split())}\n"
        try:
            with private_file(self._trusted, note.encode()) as temporary:
                temporary.chmod(0o644)
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, self._mark(fingerprint))
        except OSError as error:
            raise (as_machine_error(error) or error) from None

    def public_key(self, fingerprint: str) -> Path:
        """The PEM file of a key that may sign.

        Raises:
            RevokedKeyError: it may no more.
            UnknownKeyError: it never might.
        """
        if self._mark(fingerprint).exists():
            raise RevokedKeyError(
                f"signed by key {fingerprint}, which was revoked{self._note(fingerprint)}",
                hint="publish it again, signed with another key",
            )
        path = self._trusted / f"{fingerprint}.pub"
        if not path.is_file():
            raise UnknownKeyError(
                f"signed by key {fingerprint}, which is not trusted here",
                hint="if you trust its owner: `heliostat models keys trust FILE` with its PEM file",
            )
        return path

    def find(self, prefix: str) -> str:
        """The fingerprint that begins so: all 64 digits, or at least 8 of a key known here.

        Raises:
            NotFoundError: no known key begins so.
            UsageError: too short, not hexadecimal or not unique.
        """
        if _FINGERPRINT.fullmatch(prefix):
            return prefix
        if len(prefix) < _MIN_PREFIX or not re.fullmatch("[0-9a-f]+", prefix, re.ASCII):
            raise UsageError(
                f"'{prefix[:80]}' is not a key's fingerprint",
                hint=f"give {_MIN_PREFIX} to 64 of its hexadecimal digits",
            )
        matching = [key.fingerprint for key in self.known() if key.fingerprint.startswith(prefix)]
        if not matching:
            raise NotFoundError(
                f"no known key begins with {prefix}", hint="see `heliostat models keys list`"
            )
        if len(matching) > 1:
            raise UsageError(f"{len(matching)} keys begin with {prefix}", hint="give more digits")
        return matching[0]

    def known(self) -> list[SigningKey]:
        """Every known key, those that may sign first; none is local if that cannot be read."""
        local = ""
        with contextlib.suppress(NotRunningError, SignatureError):
            local = fingerprint_of(public_pem(self.private_key))
        revoked = {path.stem for path in self._trusted.glob("*.revoked")}
        trusted = {path.stem for path in self._trusted.glob("*.pub")} - revoked
        return [SigningKey(name, "trusted", name == local, "") for name in sorted(trusted)] + [
            SigningKey(name, "revoked", name == local, self._note(name).removeprefix(": "))
            for name in sorted(revoked)
        ]

    def _mark(self, fingerprint: str) -> Path:
        return self._trusted / f"{fingerprint}.revoked"

    def _note(self, fingerprint: str) -> str:
        try:
            text = self._mark(fingerprint).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return f": {' '.join(text.split())[:200]}" if text.strip() else ""

    def _make_directory(self) -> None:
        try:
            self._trusted.mkdir(parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            self._remove_abandoned()
        except OSError as error:
            raise MachineError(
                f"key directory {self._directory} cannot be made: {error.strerror}",
                hint="check HELIOSTAT_HOME and its permissions",
            ) from None

    def _remove_abandoned(self) -> None:
        """What a rotation that was killed left: a private key that nobody uses."""
        for directory in (self._directory, self._trusted):
            for path in directory.glob(f"{_NEW}*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                        path.unlink()

    def _write_public(self, public: bytes) -> None:
        target = self._trusted / f"{fingerprint_of(public)}.pub"
        if target.exists():
            return
        try:
            with private_file(self._trusted, public) as temporary:
                temporary.chmod(0o644)
                temporary.replace(target)
        except OSError as error:
            raise (as_machine_error(error) or error) from None


def ensure_local_key(keys_dir: Path) -> str:
    """See `SigningKeys.ensure_local`."""
    return SigningKeys(keys_dir).ensure_local()


@contextlib.contextmanager
def private_file(directory: Path, data: bytes) -> Iterator[Path]:
    """A file of mode 0600 with `data`, removed at the end unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=_NEW)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
