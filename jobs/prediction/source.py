"""The input: its files, its digest, and how its rows fall into parts.

Rows keep their order. A part never spans two files, nor two row groups of a Parquet file, so that
it is read without what comes before. It knows nothing of models.

    plan = plan_input("storage://files/rows.jsonl", 1000, settings)
    for part, rows in read_task(plan.tasks()[0]): …
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ConflictError, InputError, first_line
from cluster.settings import Settings
from cluster.storage import open_filesystem
from jobs.data.locations import SourceFile, join, list_files, opened
from jobs.prediction.rows import BadRow, Row, parse_line

STORAGE_SCHEME = "storage://"

Format = Literal["jsonl", "parquet"]
_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_READ_BYTES = 1024**2
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class InputPart:
    """Neighbouring rows of one file."""

    number: int
    """From 0, over all files."""
    file: SourceFile
    group: int
    """Parquet: the row group; parts of one are read together."""
    start: int
    end: int
    """JSONL: first byte, and one past the last."""
    first_row: int
    """Number of the first row, from 1, over all files."""
    first_in_file: int
    """The same in its file: a line, or a row."""
    num_rows: int
    stride: int
    """Rows of the parts before it in its file."""


@dataclass(frozen=True)
class InputPlan:
    """What is to be read."""

    format: Format
    digest: str
    """Of the files' bytes, in their order; not of their names."""
    files: tuple[SourceFile, ...]
    parts: tuple[InputPart, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def tasks(self, but: Collection[int] = ()) -> list[tuple[InputPart, ...]]:
        """Parts that are read in one go, in order, without some that are done."""
        wanted = (part for part in self.parts if part.number not in but)
        return [
            tuple(found)
            for _, found in itertools.groupby(wanted, key=lambda part: (part.file.path, part.group))
        ]

    def require_unchanged(self) -> None:
        """Raises ConflictError if a file is not any more what it was when this was planned."""
        for file in self.files:
            filesystem, _ = open_filesystem(file.root or file.path)
            now = filesystem.get_file_info(file.path)
            if (now.size, now.mtime_ns or 0) != (file.size_bytes, file.mtime_ns):
                raise ConflictError(
                    f"input file '{file.name}' was changed while it was read",
                    hint="delete the output and predict again",
                )


def plan_input(location: str, rows_per_part: int, settings: Settings) -> InputPlan:
    """Read all of the input once, for its digest and its rows' places.

    Raises:
        InputError: there is no such file, it has no rows, or its format is unknown or mixed.
    """
    with _as_input():
        files = _list(resolve(location, settings), location)
    formats = {_FORMATS[_suffix(file.path)] for file in files}
    if len(formats) > 1:
        raise InputError(
            f"input '{location}' holds both JSONL and Parquet",
            hint="name one kind, e.g. with a pattern: folder/*.jsonl",
            param="input",
        )
    (form,) = formats
    hasher = hashlib.sha256()
    parts: list[InputPart] = []
    row = 1
    for file in files:
        with _as_input():
            plan = _plan_lines if form == "jsonl" else _plan_groups
            found = list(plan(file, rows_per_part, hasher))
        for part in found:
            parts.append(replace(part, number=len(parts), first_row=row))
            row += part.num_rows
    if not parts:
        raise InputError(f"input '{location}' has no rows", hint="correct input", param="input")
    return InputPlan(form, f"sha256:{hasher.hexdigest()}", files, tuple(parts))


def resolve(location: str, settings: Settings) -> str:
    """`storage://KEY` as the path or URL that it stands for; any other location as it is."""
    if not location.startswith(STORAGE_SCHEME):
        return location
    key = location.removeprefix(STORAGE_SCHEME)
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise InputError(
            f"'{location}' is no place in our storage", hint="write it like storage://folder/name"
        )
    return join(settings.storage_root, key)


def read_task(
    parts: Sequence[InputPart],
) -> Iterator[tuple[InputPart, list[Row | BadRow]]]:
    """The rows of parts that belong together; blank lines are no rows."""
    first = parts[0]
    with _as_input(), opened(first.file) as stream:
        if _FORMATS[_suffix(first.file.path)] == "parquet":
            yield from _read_group(parts, stream)
            return
        for part in parts:
            stream.seek(part.start)
            data = bytes(stream.read(part.end - part.start))
            yield part, list(_read_lines(part, data))


def _list(location: str, shown: str) -> tuple[SourceFile, ...]:
    base = location.partition("?")[0] if "://" in location else location
    is_pattern = not _WILD.isdisjoint(base)
    is_folder = not is_pattern and _is_folder(location)
    found = list_files([join(location, "**/*") if is_folder else location])
    files = tuple(file for file in found if _suffix(file.path) in _FORMATS)
    if not files:
        raise InputError(
            f"input '{shown}' is neither JSONL nor Parquet",
            hint=f"expected files that end in {', '.join(_FORMATS)}",
            param="input",
        )
    return files


def _is_folder(location: str) -> bool:
    from pyarrow import fs

    if "://" not in location:
        return Path(location).is_dir()
    filesystem, path = open_filesystem(location)
    return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def _plan_lines(file: SourceFile, rows_per_part: int, hasher: Any) -> Iterator[InputPart]:
    start = position = line = 0
    start_line = 1
    is_open = False
    with opened(file) as stream:
        while block := bytes(stream.read(_READ_BYTES)):
            hasher.update(block)
            found = -1
            while (found := block.find(b"\n", found + 1)) >= 0:
                line += 1
                if line % rows_per_part == 0:
                    end = position + found + 1
                    yield InputPart(
                        0, file, start, start, end, 0, start_line, rows_per_part, rows_per_part
                    )
                    start, start_line = end, line + 1
            position += len(block)
            is_open = not block.endswith(b"\n")
    if count := line + is_open - start_line + 1:
        yield InputPart(0, file, start, start, position, 0, start_line, count, rows_per_part)


def _plan_groups(file: SourceFile, rows_per_part: int, hasher: Any) -> Iterator[InputPart]:
    from pyarrow import parquet

    with opened(file) as stream:
        while block := bytes(stream.read(_READ_BYTES)):
            hasher.update(block)
        metadata = parquet.ParquetFile(stream).metadata
        first = 1
        for group in range(metadata.num_row_groups):
            end = first + metadata.row_group(group).num_rows
            for start in range(first, end, rows_per_part):
                count = min(rows_per_part, end - start)
                yield InputPart(0, file, group, 0, 0, 0, start, count, rows_per_part)
            first = end


def _read_lines(part: InputPart, data: bytes) -> Iterator[Row | BadRow]:
    for offset, line in enumerate(data.split(b"\n")):
        number, where = part.first_row + offset, f"{part.file.name}:{part.first_in_file + offset}"
        if not line.strip():
            continue
        try:
            yield Row(number, where, parse_line(line))
        except ValueError as error:
            yield BadRow(number, where, str(error))


def _read_group(
    parts: Sequence[InputPart], stream: Any
) -> Iterator[tuple[InputPart, list[Row | BadRow]]]:
    from pyarrow import parquet

    wanted = {part.first_in_file: part for part in parts}
    file = parquet.ParquetFile(stream)
    group = parts[0].group
    before = sum(file.metadata.row_group(i).num_rows for i in range(group))
    first = before + 1
    size = parts[0].stride
    for batch in file.iter_batches(batch_size=size, row_groups=[group], use_threads=False):
        if (part := wanted.get(first)) is not None:
            yield (
                part,
                [
                    Row(part.first_row + i, f"{part.file.name}, row {first + i}", values)
                    for i, values in enumerate(batch.to_pylist())
                ],
            )
        first += len(batch)


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


@contextlib.contextmanager
def _as_input() -> Iterator[None]:
    """Errors of reading data name the key that is ours."""
    import pyarrow as pa

    try:
        yield
    except InputError as error:
        hint = (error.hint or "").replace("data.source.paths", "input") or None
        raise InputError(error.message, hint=hint, param="input") from None
    except pa.ArrowInvalid as error:
        raise InputError(
            f"an input file is not whole Parquet: {first_line(error)}",
            hint="write or copy it again",
            param="input",
        ) from None
