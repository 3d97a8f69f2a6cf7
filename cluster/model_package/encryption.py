"""Files encrypted at rest with Tink's streaming AEAD. `FORMAT.md`, section 7.

A keyset is a file with one primary key, which encrypts, and older ones, which only decrypt. It is
read anew for each package, so whoever shares it sees a new key at once. Knows nothing of storage,
nor of what a package is. The library is imported on first use.

    keyset = Keyset(settings.keys_dir / "encryption_keyset.json")
    keyset.ensure()
    with keyset.open().encrypting(file, bound_to(digest, "model/model.onnx")) as stream:
        stream.write(data)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from cluster.errors import ChangedFileError, DecryptionError, MachineError, NotRunningError
from cluster.model_package.keys import private_file

ALGORITHM = "AES256_GCM_HKDF_1MB"
_COPY_BYTES = 1024**2


class Keyset:
    """The encryption keys in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ensure(self) -> None:
        """Make the file with a first key, mode 0600, if it is not there.

        Safe to call from several processes at once: all get the same key.
        """
        if self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (
                private_file(self.path.parent, _new_keyset()) as temporary,
                contextlib.suppress(FileExistsError),
            ):
                os.link(temporary, self.path)
        except OSError as error:
            raise self._unwritable(error) from None

    def rotate(self, keep: Collection[int]) -> None:
        """Encrypt with a fresh key from now on; of the others only the last and `keep` stay.

        Raises:
            NotRunningError: there is no keyset yet.
            MachineError: it cannot be written.
        """
        values, fresh = self._read(), json.loads(_new_keyset())
        kept = {*keep, values["primaryKeyId"]}
        # Key ids are random, of 32 bits: two alike could not be told apart.
        while fresh["primaryKeyId"] in kept:
            fresh = json.loads(_new_keyset())
        keys = [key for key in values["key"] if key["keyId"] in kept] + fresh["key"]
        text = json.dumps({"primaryKeyId": fresh["primaryKeyId"], "key": keys}, indent=2)
        try:
            with private_file(self.path.parent, text.encode()) as temporary:
                temporary.replace(self.path)
        except OSError as error:
            raise self._unwritable(error) from None

    def open(self) -> Keys:
        """The keys as they are now.

        Raises:
            NotRunningError: there is no keyset.
            DecryptionError: it cannot be read.
        """
        import tink
        from tink import json_proto_keyset_format, secret_key_access, streaming_aead

        values = self._read()
        streaming_aead.register()
        try:
            handle = json_proto_keyset_format.parse(json.dumps(values), secret_key_access.TOKEN)
            primitive = handle.primitive(streaming_aead.StreamingAead)
        except tink.TinkError:
            # What Tink says may quote the file.
            raise self._unreadable() from None
        ids = frozenset(key["keyId"] for key in values["key"])
        return Keys(values["primaryKeyId"], ids, primitive)

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_bytes())
            if not isinstance(values["primaryKeyId"], int):
                raise TypeError
            if not all(isinstance(key["keyId"], int) for key in values["key"]):
                raise TypeError
        except FileNotFoundError:
            raise NotRunningError(
                f"there is no encryption keyset at {self.path}",
                hint="run `heliostat up` first, or copy it from the machine that made it",
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise self._unreadable() from None
        return cast("dict[str, Any]", values)

    def _unreadable(self) -> DecryptionError:
        return DecryptionError(
            f"{self.path} is not a Tink keyset for {ALGORITHM}", hint="restore it from a backup"
        )

    def _unwritable(self, error: OSError) -> MachineError:
        return MachineError(
            f"encryption keyset {self.path} cannot be written: {error.strerror or error}",
            hint="check HELIOSTAT_ENCRYPTION_KEYSET and its permissions",
        )


@dataclass(frozen=True)
class Keys:
    """What a keyset held when it was opened."""

    primary_id: int
    ids: frozenset[int]
    _primitive: Any

    @contextlib.contextmanager
    def encrypting(self, target: BinaryIO, associated_data: bytes) -> Iterator[BinaryIO]:
        """A stream that encrypts to `target` with the primary key; whole when it is left.

        Raises:
            OSError: `target` could not be written.
        """
        import tink

        watched = _Watched(target)
        try:
            made = self._primitive.new_encrypting_stream(cast(BinaryIO, watched), associated_data)
            with made as stream:
                yield stream
        except tink.TinkError:
            raise watched.error or OSError(errno.EIO, "it cannot be encrypted") from None

    def decrypt(
        self, source: BinaryIO, target: BinaryIO, associated_data: bytes, *, name: str
    ) -> None:
        """Decrypt a stream, whichever key it was encrypted with.

        Raises:
            ChangedFileError: it is not what was encrypted, or not with one of these keys, or for
                another place.
            OSError: `source` could not be read, or `target` written.
        """
        import tink

        watched = _Watched(source)
        made = self._primitive.new_decrypting_stream(cast(BinaryIO, watched), associated_data)
        with made as decrypting:
            while True:
                try:
                    chunk = decrypting.read(_COPY_BYTES)
                except tink.TinkError:
                    raise watched.error or ChangedFileError(
                        f"encrypted file '{name}' is not the one that was published",
                        hint="fetch the package again from where it was published",
                    ) from None
                if not chunk:
                    return
                target.write(chunk)


def bound_to(digest: str, name: str) -> bytes:
    """Associated data: the package and the path that a ciphertext belongs to."""
    return f"heliostat model package\n{digest}\n{name}".encode()


class _Watched:
    """A stream that outlives Tink's, which would close it, and that keeps what went wrong with it,
    of which Tink would make a text."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.closed = False
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        with self._kept():
            return self._stream.write(data)

    def read(self, size: int) -> bytes:
        with self._kept():
            return self._stream.read(size)

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        # Ctrl-C too.
        except BaseException as error:
            self.error = error
            raise


def _new_keyset() -> bytes:
    import tink
    from tink import json_proto_keyset_format, secret_key_access, streaming_aead

    streaming_aead.register()
    template = getattr(streaming_aead.streaming_aead_key_templates, ALGORITHM)
    handle = tink.new_keyset_handle(template)
    text: str = json_proto_keyset_format.serialize(handle, secret_key_access.TOKEN)
    return text.encode()
