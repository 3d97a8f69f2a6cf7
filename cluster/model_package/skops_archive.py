"""A skops file is a ZIP of arrays: what it would fill memory with is counted before it is loaded.

Knows nothing of estimators.

    check_archive(Path("model.skops"))
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from cluster.errors import PackageError

MAX_BYTES = 1024**3
# What it says of the objects; as Python's own it takes ten times as much. A tree takes 15 KB.
_MAX_SCHEMA_BYTES = 64 * 1024**2
# Arrays of zeros pack a thousandfold, which only a small file may make use of.
_MAX_RATIO = 100
_ALWAYS_BYTES = 64 * 1024**2

_SCHEMA = "schema.json"
_CHUNK_BYTES = 1024**2


def check_archive(source: Path) -> None:
    """Unpack everything once, piece by piece, and keep none of it.

    Raises:
        PackageError: it would be too large, or an array is not as large as it says.
        ValueError, OSError, zipfile.BadZipFile and more: it is no whole ZIP.
    """
    limit = min(MAX_BYTES, max(_ALWAYS_BYTES, _MAX_RATIO * source.stat().st_size))
    sizes = _measure(source, limit)
    if sizes.get(_SCHEMA, 0) > _MAX_SCHEMA_BYTES:
        raise _too_large(_SCHEMA, _MAX_SCHEMA_BYTES)
    with zipfile.ZipFile(source) as archive:
        schema = json.loads(archive.read(_SCHEMA))
    # One file may be named by many objects, each of which loads it.
    if sum(sizes.get(name, 0) for name, _ in _loaded(schema)) > limit:
        raise _too_large(str(source), limit)


def _measure(source: Path | IO[bytes], limit: int) -> dict[str, int]:
    """Bytes by member when it is loaded, at most `limit` in all."""
    sizes: dict[str, int] = {}
    left = limit
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"'{info.filename[:80]}' is not packed with deflate")
            size = _measure_member(archive, info, left)
            sizes[info.filename] = max(size, sizes.get(info.filename, 0))
            left -= size
    return sizes


def _measure_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> int:
    declared, info.file_size = info.file_size, limit + 1
    if declared > limit:
        raise _too_large(info.filename, limit)
    # Read as if it were as large as may be, or no more than declared would show.
    with archive.open(info) as stream:
        head = stream.read(_CHUNK_BYTES)
        size, kept = len(head), [head]
        is_archive = head.startswith(b"PK")
        while size <= limit and (chunk := stream.read(_CHUNK_BYTES)):
            size += len(chunk)
            if is_archive:
                kept.append(chunk)
    if size > limit:
        raise _too_large(info.filename, limit)
    for expected in (declared, _array_bytes(head) if head.startswith(b"\x93NUMPY") else size):
        if size != expected:
            raise PackageError(
                f"'{info.filename[:80]}' has {size} bytes, expected {expected}",
                hint="the file is damaged or was tampered with; save the model again",
            )
    if is_archive:
        # A sparse matrix: arrays in a ZIP of its own.
        size += sum(_measure(io.BytesIO(b"".join(kept)), limit - size).values())
    return size


def _array_bytes(head: bytes) -> int:
    """What a `.npy` file with this beginning must have."""
    stream = io.BytesIO(head)
    is_first = np.lib.format.read_magic(stream) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return stream.tell() + math.prod(shape) * dtype.itemsize


def _loaded(schema: Any) -> set[tuple[str, str]]:
    """Members by the object that loads them."""
    found, todo = set(), [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo.extend(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
            if isinstance(name := value.get("file"), str):
                found.add((name, str(value.get("__id__"))))
    return found


def _too_large(name: str, limit: int) -> PackageError:
    return PackageError(
        f"'{name[:200]}' has more than the {limit} bytes allowed for it when it is unpacked",
        hint=f"at most {_MAX_RATIO} times the file's size and {MAX_BYTES // 1024**2} MiB in all, "
        f"of which {_SCHEMA} at most {_MAX_SCHEMA_BYTES // 1024**2}: import a smaller model",
    )
