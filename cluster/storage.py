"""The door to shared storage: packages, checkpoints and datasets in a folder, S3 or GCS.

Keys are POSIX paths below the root. A directory appears whole or not at all: in a folder it is
renamed into place, in an object store a marker object is written last. Knows nothing of what it
stores.

    storage = Storage.open(settings.storage_root)
    with storage.staging() as stage:
        (stage / "data.txt").write_text("…")
        storage.put_dir(stage, "datasets/abc", move=True)
    storage.get_dir("datasets/abc", Path("/tmp/abc"))
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import (
    ConfigError,
    HeliostatError,
    MachineError,
    NotFoundError,
    NotRunningError,
    first_line,
)

_MARKER = ".complete"
_STAGING = ".staging"
_COPY_BYTES = 1024**2
_BLOCK_BYTES = 256 * 1024
_BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.]*:/")
_ROOT_HINT = "expected a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"

OBJECT_STORES = ("s3", "gs", "gcs")
"""Schemes of a root that is no folder."""


@dataclass(frozen=True)
class Stored:
    """A file in storage, or a directory, whole or not."""

    key: str
    size_bytes: int
    modified_at_s: float
    """When it, or its newest file, was written, in seconds since 1970."""


class Storage:
    """One root; open it with `Storage.open`."""

    def __init__(self, filesystem: Any, base: str, root: str, folder: Path | None) -> None:
        self._filesystem = filesystem
        self._base = base
        self._folder = folder
        self.root = root
        """The root without credentials and options."""

    @classmethod
    def open(cls, root: str) -> Storage:
        """Open a folder (made by the first write), `s3://bucket/prefix` or `gs://bucket/prefix`.

        Raises:
            ConfigError: not a root this door knows.
        """
        from pyarrow import fs

        scheme, separator, _ = root.partition("://")
        # With one slash it would be a folder, whose name holds the credentials.
        if scheme not in (*OBJECT_STORES, "file") and (separator or _BROKEN_URL.match(root)):
            shown = scheme if separator else root.partition(":")[0]
            raise ConfigError(f"storage root {shown}:… is of no kind known here", hint=_ROOT_HINT)
        if not separator or scheme == "file":
            folder = Path(root.removeprefix("file://")).expanduser().absolute()
            return cls(fs.LocalFileSystem(), str(folder), str(folder), folder)
        try:
            filesystem, base = fs.FileSystem.from_uri(root)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"storage root {scheme}://… cannot be opened: {_without(root, error)}",
                hint=_ROOT_HINT,
            ) from None
        base = base.rstrip("/")
        if not base:
            raise ConfigError(f"storage root {scheme}://… names no bucket", hint=_ROOT_HINT)
        # The given root may hold credentials; this one is shown and stored.
        return cls(filesystem, base, f"{scheme}://{base}", None)

    @property
    def is_folder(self) -> bool:
        """Whether the root is a folder, rather than in an object store."""
        return self._folder is not None

    def require_root(self) -> None:
        """Raises NotRunningError for a folder that is not there, as of a disk not mounted, and for
        an S3 bucket that does not exist: what lists either finds nothing, and no fault."""
        if self._folder is not None and not self._folder.is_dir():
            raise NotRunningError(
                f"storage folder {self.root} is not there",
                hint="mount its disk, or check HELIOSTAT_STORAGE_URL",
            )
        if self._filesystem.type_name == "s3":
            self._require_bucket()

    def path(self, key: str) -> str:
        """Where `key` lies, for people and for tools: a path or a URL."""
        return f"{self.root}/{_checked(key)}"

    def local_path(self, key: str) -> Path | None:
        """The path of `key` where the root is a folder, None for an object store."""
        return self._folder / _checked(key) if self._folder is not None else None

    def exists(self, key: str) -> bool:
        """Whether there is a file or a whole directory at `key`."""
        with _errors_named(self.path(key)):
            if self._folder is not None:
                return (self._folder / key).exists()
            return self._is_file(key) or self._is_file(key + _MARKER)

    def read_bytes(self, key: str) -> bytes:
        """Raises NotFoundError."""
        with (
            _errors_named(self.path(key)),
            self._filesystem.open_input_stream(self._full(key)) as stream,
        ):
            return bytes(stream.read())

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write or replace one file, whole or not at all."""
        self.write_chunks(key, [data])

    def write_chunks(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write or replace one large file, whole or not at all, without holding it in memory.

        Where the root is an object store, what raises in the middle may leave a part at `key`.
        """
        with _errors_named(self.path(key)):
            if self._folder is None:
                with self._filesystem.open_output_stream(self._full(key)) as stream:
                    for chunk in chunks:
                        stream.write(chunk)
                return
            with self.staging() as stage:
                with (stage / "file").open("wb") as file:
                    file.writelines(chunks)
                _sync_tree(stage)
                self._parent(key)
                (stage / "file").replace(self._folder / key)

    def put_file(self, local: Path, key: str) -> None:
        """Copy one file to `key`, or replace what is there: whole or not at all."""
        from pyarrow import fs

        if self._folder is not None:
            with local.open("rb") as file:
                self.write_chunks(key, iter(lambda: file.read(_COPY_BYTES), b""))
            return
        with _errors_named(self.path(key)):
            # In one call, which a signal does not break off: a stream that is left early is closed,
            # and what it had got replaces the object.
            fs.copy_files(str(local), self._full(key), destination_filesystem=self._filesystem)

    def get_file(self, key: str, local: Path) -> None:
        """Copy one file to `local`. Raises NotFoundError."""
        from pyarrow import fs

        with _errors_named(self.path(key), written=str(local)):
            fs.copy_files(self._full(key), str(local), source_filesystem=self._filesystem)

    def delete_file(self, key: str) -> None:
        """Remove one file; nothing there is no error."""
        with _errors_named(self.path(key)), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._full(key))

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all files below `prefix`, sorted; staging and markers left out."""
        return [file.key for file in self.files(prefix)]

    def files(self, prefix: str) -> builtins.list[Stored]:
        """The files that `list` names."""
        infos = ((self._key(info), info) for info in self._files(prefix))
        found = [
            Stored(key, info.size, info.mtime_ns / 1e9)
            for key, info in infos
            if not key.startswith(_STAGING) and not key.endswith(_MARKER)
        ]
        return sorted(found, key=lambda file: file.key)

    def directories(self, prefix: str) -> builtins.list[Stored]:
        """The directories that lie directly below `prefix`, by key, unfinished ones included."""
        sizes: dict[str, int] = defaultdict(int)
        times_ns: dict[str, int] = defaultdict(int)
        for info in self._files(prefix):
            key = self._key(info)
            name, is_nested, _ = key.removeprefix(f"{prefix}/").partition("/")
            if is_nested or name.endswith(_MARKER):
                directory = f"{prefix}/{name.removesuffix(_MARKER)}"
                sizes[directory] += info.size
                times_ns[directory] = max(times_ns[directory], info.mtime_ns)
        return [Stored(key, sizes[key], times_ns[key] / 1e9) for key in sorted(sizes)]

    def modified_at_s(self, key: str) -> float | None:
        """When a file, or a directory's newest one, was written, in seconds since 1970; None if
        there is none."""
        from pyarrow import fs

        with _errors_named(self.path(key)):
            ends = self._filesystem.get_file_info([self._full(key), self._full(key + _MARKER)])
        infos = [info for info in ends if info.type == fs.FileType.File]
        if ends[0].type != fs.FileType.File:
            infos += self._files(key)
        return max(info.mtime_ns for info in infos) / 1e9 if infos else None

    def stages(self) -> builtins.list[Stored]:
        """Staging directories, of writers at work and of such as were killed."""
        return self.directories(_STAGING)

    def contents(self) -> builtins.list[tuple[str, int]]:
        """Every file and its size in bytes, by key, as `write_file` takes them: staging left out,
        an object store's markers included."""
        files = ((self._key(info), info.size) for info in self._files(""))
        return sorted((key, size) for key, size in files if not key.startswith(_STAGING))

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[BinaryIO]:
        """A file's bytes as a stream."""
        with (
            _errors_named(self.path(key)),
            self._filesystem.open_input_stream(self._full(key)) as stream,
        ):
            yield stream

    def lines(self, key: str, *, max_bytes: int) -> Iterator[bytes]:
        """A file's lines without their ends, a block of it in memory at a time; of a line that is
        longer than `max_bytes` the beginning, which is longer than that too."""
        line = bytearray()
        with self.reading(key) as stream:
            while block := stream.read(_BLOCK_BYTES):
                *ends, rest = bytes(block).split(b"\n")
                for end in ends:
                    line += end[: max_bytes + 1 - len(line)]
                    yield bytes(line)
                    line.clear()
                line += rest[: max_bytes + 1 - len(line)]
        if line:
            yield bytes(line)

    def write_file(self, key: str, source: BinaryIO) -> None:
        """Write or replace one file from a stream, without holding it."""
        with _errors_named(self.path(key)):
            if self._folder is not None:
                self._parent(key)
            with self._filesystem.open_output_stream(self._full(key)) as stream:
                shutil.copyfileobj(source, stream, _COPY_BYTES)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh local directory, gone at the end; in a folder it is on the root's own disk."""
        with _errors_named(self.root):
            parent = self._folder / _STAGING if self._folder is not None else None
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(prefix="stage-", dir=parent))
            # mkdtemp's 0700 would hide what is published from other users of a shared folder.
            stage.chmod(0o755)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def put_dir(self, local: Path, key: str, *, move: bool = False) -> bool:
        """Publish a directory whole; what is at `key` already is kept, as new, and False returned.

        Args:
            move: `local` may be used up, which saves a copy where it lies on the root's disk.
        """
        with _errors_named(self.path(key)):
            if self.exists(key):
                self._renew(key)
                return False
            if self._folder is None:
                return self._upload(local, key)
            with self.staging() as stage:
                copy = stage / "dir"
                if not (move and _same_disk(local, stage) and _moved(local, copy)):
                    _copy_tree(local, copy)
                _sync_tree(copy)
                self._parent(key)
                return _moved(copy, self._folder / key)

    def get_dir(self, key: str, local: Path) -> None:
        """Copy a published directory to `local`, which must not exist.

        Raises:
            NotFoundError: nothing, or only a part, is at `key`.
        """
        if not self.exists(key):
            raise NotFoundError(f"{self.path(key)} does not exist", hint="check storage_url")
        with _errors_named(self.path(key), written=str(local)):
            if self._folder is not None:
                _copy_tree(self._folder / key, local)
                return
            self._download(key, local)

    def delete_dir(self, key: str) -> None:
        """Remove a directory; nothing there is no error."""
        with _errors_named(self.path(key)):
            if self._folder is not None:
                with self.staging() as stage, contextlib.suppress(FileNotFoundError):
                    (self._folder / key).rename(stage / "dir")
                return
            if self._is_file(key + _MARKER):
                self._filesystem.delete_file(self._full(key + _MARKER))
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_dir(self._full(key))

    def _require_bucket(self) -> None:
        from pyarrow import fs

        bucket = self._base.partition("/")[0]
        with _errors_named(self.root):
            found = self._filesystem.get_file_info(bucket)
        if found.type == fs.FileType.NotFound:
            raise NotRunningError(
                f"bucket '{bucket}' of storage {self.root} does not exist",
                hint="make it, or check HELIOSTAT_STORAGE_URL",
            )

    def _files(self, prefix: str) -> builtins.list[Any]:
        from pyarrow import fs

        start = self._full(prefix) if prefix else self._base
        with _errors_named(self.path(prefix) if prefix else self.root):
            selector = fs.FileSelector(start, recursive=True, allow_not_found=True)
            found = self._filesystem.get_file_info(selector)
        return [info for info in found if info.type == fs.FileType.File]

    def _key(self, info: Any) -> str:
        return str(info.path.removeprefix(self._base).lstrip("/"))

    def _full(self, key: str) -> str:
        return f"{self._base}/{_checked(key)}"

    def _parent(self, key: str) -> None:
        assert self._folder is not None
        (self._folder / key).parent.mkdir(parents=True, exist_ok=True)

    def _is_file(self, key: str) -> bool:
        from pyarrow import fs

        return bool(self._filesystem.get_file_info(self._full(key)).type == fs.FileType.File)

    def _renew(self, key: str) -> None:
        """Give what is published today's date, so that it is not taken for garbage."""
        if self._folder is None:
            self._write_marker(key)
            return
        for path in (self._folder / key).rglob("*"):
            os.utime(path, follow_symlinks=False)

    def _write_marker(self, key: str) -> None:
        with self._filesystem.open_output_stream(self._full(key + _MARKER)) as stream:
            stream.write(b"")

    def _upload(self, local: Path, key: str) -> bool:
        from pyarrow import fs

        try:
            for path in sorted(p for p in local.rglob("*") if p.is_file()):
                target = f"{self._full(key)}/{path.relative_to(local).as_posix()}"
                fs.copy_files(str(path), target, destination_filesystem=self._filesystem)
            self._write_marker(key)
        # Also where it is stopped.
        except BaseException:
            with contextlib.suppress(OSError):
                self._filesystem.delete_dir(self._full(key))
            raise
        return True

    def _download(self, key: str, local: Path) -> None:
        from pyarrow import fs

        local.mkdir(parents=True)
        start = self._full(key)
        for info in self._filesystem.get_file_info(fs.FileSelector(start, recursive=True)):
            if info.type != fs.FileType.File:
                continue
            # A key may hold '..', which a file system would follow out of `local`.
            target = local / _checked(info.path.removeprefix(start).lstrip("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(info.path, str(target), source_filesystem=self._filesystem)


def open_filesystem(location: str) -> tuple[Any, str]:
    """The pyarrow file system of a path or URL (`s3://…`, `gs://…`, …), and the path in it.

    Raises:
        ConfigError: no file system that pyarrow knows, or its options are wrong.
    """
    from pyarrow import fs

    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (OSError, ValueError) as error:
        scheme = location.partition("://")[0]
        raise ConfigError(
            f"{scheme}://… cannot be opened: {_without(location, error)}",
            hint="expected a path, s3://BUCKET/PATH, gs://BUCKET/PATH or file:///PATH",
        ) from None
    return filesystem, path


def _without(location: str, error: Exception) -> str:
    """What pyarrow says of a URL; it quotes it, with the credentials that it may hold."""
    text = first_line(str(error).replace(location, "…"))
    secret = location.partition("://")[2].rpartition("@")[0].partition(":")[2]
    if secret and secret in text:
        return "it is not a valid URL"
    if "Cannot parse URI" in text:
        return f"{text}; in credentials write / as %2F and + as %2B"
    return text


def _checked(key: str) -> str:
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise ConfigError(
            f"storage key {key!r} is not a relative path", hint="write it like 'datasets/abc'"
        )
    return key


def _moved(source: Path, target: Path) -> bool:
    """Rename a directory; False if the target exists."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _copy_tree(source: Path, target: Path) -> None:
    """Copy; symlinks stay symlinks, so that whoever checks the copy sees them."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            copy.mkdir()
        else:
            shutil.copyfile(path, copy, follow_symlinks=False)


def _same_disk(first: Path, second: Path) -> bool:
    return first.stat().st_dev == second.stat().st_dev


def _sync_tree(directory: Path) -> None:
    """Let the bytes reach the disk before a name points to them."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors_named(where: str, written: str = "") -> Iterator[None]:
    """Of `where` in storage; `written` is what was being written, if that lies elsewhere."""
    try:
        yield
    except HeliostatError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{where} does not exist", hint="check storage_url") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"no space left on the disk of {written or where}",
                hint="free some, or move HELIOSTAT_HOME or HELIOSTAT_STORAGE_URL",
            ) from None
        reason = (error.strerror or str(error)).splitlines()[0]
        raise NotRunningError(
            f"storage {where} cannot be used: {reason}",
            hint="check storage_url, its credentials and permissions",
        ) from None
