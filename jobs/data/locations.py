"""Where data files lie: paths, globs and URLs become a list of files that can be opened anywhere.

It knows nothing about what files hold.

    files = list_files(("corpus/**/*.jsonl", "s3://bucket/more/*.jsonl"))
    with opened(files[0]) as stream: stream.read(10)
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, HeliostatError, InputError
from cluster.storage import open_filesystem

_PARAM = "data.source.paths"
_WILD = re.compile(r"[*?\[]")
_CLASS = re.compile(r"\[!?\]?[^\]/]*\]")


@dataclass(frozen=True)
class SourceFile:
    """One file, as it was when it was listed."""

    name: str
    """As messages call it."""
    root: str
    """What `open_filesystem` takes to reach its file system."""
    path: str
    """Within that."""
    size_bytes: int
    mtime_ns: int


def list_files(patterns: Sequence[str]) -> tuple[SourceFile, ...]:
    """Files in the order of the patterns, each once; those of one pattern by name.

    Raises:
        InputError: a pattern matches no file.
    """
    found: dict[tuple[str, str], SourceFile] = {}
    for pattern in patterns:
        files = _list_remote(pattern) if "://" in pattern else _list_local(pattern)
        if not files:
            where = "" if "://" in pattern else f" (looked in {Path.cwd()})"
            raise InputError(
                f"data file '{pattern}' does not exist{where}",
                hint=f"correct {_PARAM}",
                param=_PARAM,
            )
        found.update({(file.root, file.path): file for file in files})
    return tuple(found.values())


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """A pyarrow file that can be read from any position; its errors become one line."""
    filesystem = _filesystem(file.root)
    with errors_named(file.name):
        _refuse_what_may_block(filesystem, file.path, file.name, _PARAM)
        with filesystem.open_input_file(file.path) as stream:
            yield stream


def read_location(location: str, param: str, *, is_optional: bool = False) -> bytes | None:
    """The bytes of one small file; None if it is optional and not there.

    Raises:
        InputError: it is missing or cannot be read.
    """
    from pyarrow import fs

    name = location.partition("?")[0]
    with errors_named(name, param):
        filesystem, path = open_filesystem(location)
        if is_optional and filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        _refuse_what_may_block(filesystem, path, name, param)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())


def join(directory: str, name: str) -> str:
    """A file of a directory, which may be a URL with options."""
    base, mark, options = directory.partition("?") if "://" in directory else (directory, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


@contextlib.contextmanager
def errors_named(name: str, param: str = _PARAM) -> Iterator[None]:
    """Turn what a file system raises into one line that names the file."""
    try:
        yield
    except HeliostatError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"data file '{name}' does not exist", hint=f"correct {param}", param=param
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        raise InputError(
            f"data file '{name}' cannot be read: {reason}",
            hint="check its permissions, and credentials if it is in an object store",
            param=param,
        ) from None


def _refuse_what_may_block(filesystem: Any, path: str, name: str, param: str) -> None:
    """A pipe has no end until someone closes it, nor a beginning until someone writes."""
    is_local = filesystem.type_name == "local"
    if is_local and Path(path).exists() and not Path(path).is_file():
        raise InputError(
            f"data file '{name}' is no regular file", hint=f"correct {param}", param=param
        )


@functools.lru_cache(maxsize=32)
def _filesystem(root: str) -> Any:
    return open_filesystem(root)[0]


def _list_local(pattern: str) -> list[SourceFile]:
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
    return [_local_file(Path(match)) for match in matches if Path(match).is_file()]


def _local_file(path: Path) -> SourceFile:
    status = path.stat()
    # Tasks elsewhere on the machine may have another working directory.
    return SourceFile(str(path), "", str(path.absolute()), status.st_size, status.st_mtime_ns)


def _list_remote(pattern: str) -> list[SourceFile]:
    from pyarrow import fs

    location, _, options = pattern.partition("?")
    scheme, _, rest = location.partition("://")
    fixed = _WILD.split(rest)[0]
    # What comes before the first wildcard, up to its last slash, is where to look.
    start = rest if fixed == rest else fixed.rpartition("/")[0]
    root = f"{scheme}://{start}" + (f"?{options}" if options else "")
    try:
        filesystem, path = open_filesystem(root)
    except ConfigError as error:
        raise InputError(error.message, hint=error.hint, param=_PARAM) from None
    with errors_named(location):
        if fixed == rest:
            infos = [filesystem.get_file_info(path)]
        else:
            infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    wanted = _compiled(path + rest[len(start) :])
    files = [
        SourceFile(
            name=f"{scheme}://{info.path.lstrip('/') if scheme != 'file' else info.path}",
            root=root,
            path=info.path,
            size_bytes=info.size,
            mtime_ns=info.mtime_ns or 0,
        )
        for info in infos
        if info.type == fs.FileType.File and wanted.fullmatch(info.path)
    ]
    return sorted(files, key=lambda file: file.path)


def _compiled(pattern: str) -> re.Pattern[str]:
    """`**/` is any number of folders, `*` anything but a slash, `[a]` and `[!a]` a character."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    pieces = re.split(rf"(\*\*/|\*\*|\*|{_CLASS.pattern})", pattern)
    return re.compile("".join(parts.get(piece, _one_of(piece)) for piece in pieces))


def _one_of(piece: str) -> str:
    """A class of characters as an expression; any other piece as it is."""
    if not _CLASS.fullmatch(piece):
        return re.escape(piece)
    # Without the mark of the text's end that `translate` adds.
    return "(?!/)" + fnmatch.translate(piece)[:-2]
