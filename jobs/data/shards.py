"""Shards: a corpus as pieces that can be read apart from each other, in a fixed order.

A part is a range of bytes (text, JSON lines), row groups (Parquet) or record batches (Arrow) of one
file; a shard is some parts, about as large as the others. It knows nothing about tokens.

    corpus = plan_shards(source)
    for document in read_shard(source, corpus.shards[0]): …
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.errors import InputError
from jobs.data import columnar, json_lines
from jobs.data.config import (
    ChatSource,
    ColumnarSource,
    JsonLinesSource,
    LanguageSource,
    PythonHelpSource,
    PythonTopicsSource,
)
from jobs.data.documents import Document
from jobs.data.locations import SourceFile, list_files, opened
from jobs.data.parts import Part
from jobs.data.python_help import python_help

_SHARD_BYTES = 32 * 1024**2
# A document is held whole, a few times over while it is tokenised.
_MAX_DOCUMENT_BYTES = 512 * 1024**2
_NUM_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Shard:
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """What there is to read."""

    files: tuple[SourceFile, ...]
    """Empty for what ships with Python."""
    shards: tuple[Shard, ...]

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)


def plan_shards(source: LanguageSource, shard_bytes: int = _SHARD_BYTES) -> Plan:
    """List the files and, of columnar ones, read the footers.

    Raises:
        InputError: a file is missing, or is not what the source says.
    """
    if isinstance(source, PythonTopicsSource | PythonHelpSource):
        return Plan((), (Shard(()),))
    files = list_files(source.paths)
    if isinstance(source, ColumnarSource):
        with ThreadPoolExecutor(_NUM_FOOTERS_AT_ONCE) as threads:
            found = threads.map(lambda file: columnar.plan_parts(source, file, shard_bytes), files)
            parts = [part for of_file in found for part in of_file]
    elif isinstance(source, JsonLinesSource | ChatSource):
        parts = [part for file in files for part in json_lines.plan_parts(file, shard_bytes)]
    else:
        parts = [_whole(file) for file in files]
    return Plan(files, tuple(_grouped(parts, shard_bytes)))


def read_shard(source: LanguageSource, shard: Shard) -> Iterator[Document]:
    """Its documents in order.

    Raises:
        InputError: one line, naming the file and where in it something is wrong.
    """
    if isinstance(source, PythonTopicsSource):
        yield from _python_topics()
        return
    if isinstance(source, PythonHelpSource):
        yield from python_help()
        return
    for part in shard.parts:
        if isinstance(source, ColumnarSource):
            yield from columnar.read_part(source, part)
        elif isinstance(source, JsonLinesSource | ChatSource):
            yield from json_lines.read_part(source, part)
        else:
            yield Document(_read_text(part.file), functools.partial(str, part.file.name))


def _grouped(parts: Sequence[Part], shard_bytes: int) -> Iterator[Shard]:
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.size_bytes > shard_bytes:
            yield Shard(tuple(group))
            group, size = [], 0
        group.append(part)
        size += part.size_bytes
    if group:
        yield Shard(tuple(group))


def _whole(file: SourceFile) -> Part:
    if file.size_bytes > _MAX_DOCUMENT_BYTES:
        raise InputError(
            f"data file '{file.name}' is one document of {file.size_bytes / 1e6:,.0f} MB, more "
            f"than {_MAX_DOCUMENT_BYTES / 1e6:,.0f} MB",
            hint="cut it into files, or write a document per line with kind: jsonl",
            param="data.source.paths",
        )
    return Part(file, 0, file.size_bytes, file.size_bytes)


def _read_text(file: SourceFile) -> str:
    with opened(file) as stream:
        data = stream.read()
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file '{file.name}' is not UTF-8 text (byte {error.start})",
            hint="convert it to UTF-8, e.g. with iconv",
            param="data.source.paths",
        ) from None


def _python_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name], functools.partial(str, f"pydoc_data.topics: {name}"))
