"""JSON lines: a document or a conversation per line, read from any byte range of a file.

A line belongs to the range that its first byte lies in, so ranges need not know where lines end. It
knows nothing about tokens.

    for part in plan_parts(file, 32 << 20):
        for document in read_part(source, part): …
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Iterator
from typing import Any

from cluster.errors import InputError
from jobs.data.config import ChatSource, JsonLinesSource
from jobs.data.documents import Content, Document, Locate, check_messages, check_text
from jobs.data.locations import SourceFile, opened
from jobs.data.parts import Part

_COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_READ_BYTES = 1024**2
_MAX_LINE_BYTES = 512 * 1024**2
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def plan_parts(file: SourceFile, part_bytes: int) -> Iterator[Part]:
    """Byte ranges; a compressed file is one, since it can only be read from its beginning."""
    size = file.size_bytes
    step = size if _compression(file) else part_bytes
    for start in range(0, size, max(1, step)):
        end = min(start + step, size)
        yield Part(file, start, end, end - start)


def read_part(source: JsonLinesSource | ChatSource, part: Part) -> Iterator[Document]:
    """Documents of the lines that begin in the part; blank lines are passed over."""
    for number, line in enumerate(_lines(part)):
        if line.strip():
            locate = functools.partial(_locate, part, number)
            yield Document(_content(source, line, locate), locate)


def _content(source: JsonLinesSource | ChatSource, line: bytes, locate: Locate) -> Content:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{locate()}' is not UTF-8 text (byte {error.start} of the line)",
            hint="convert the file to UTF-8, e.g. with iconv",
            param="data.source.paths",
        ) from None
    # A number of thousands of digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg} (column {error.colno})"
            if isinstance(error, json.JSONDecodeError)
            else str(error).split(";")[0]
        )
        raise InputError(
            f"'{locate()}' is not JSON: {reason}",
            hint="correct or remove that line; each line must be one whole JSON object",
            param="data.source.paths",
        ) from None
    if isinstance(source, ChatSource):
        return check_messages(record, source.messages_field, locate)
    return check_text(record, source.text_field, locate)


def _lines(part: Part) -> Iterator[bytes]:
    """The lines whose first byte lies in the part."""
    with _reader(part.file) as stream:
        position = part.start
        if position:
            # The line before ends with this read, or in it with its very last byte.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < part.end or _compression(part.file):
            line = stream.readline(_MAX_LINE_BYTES)
            if not line:
                return
            if len(line) == _MAX_LINE_BYTES:
                raise InputError(
                    f"data file '{part.file.name}' has a line of more than "
                    f"{_MAX_LINE_BYTES / 1e6:,.0f} MB",
                    hint="write one JSON object per line",
                    param="data.source.paths",
                )
            yield line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line
            position += len(line)


def _locate(part: Part, number: int) -> str:
    """The place of a part's line, counted from 0; reads all that comes before the part."""
    before = 0
    if part.start:
        with _reader(part.file) as stream:
            left = part.start - 1
            while left > 0 and (block := stream.read(min(left, _READ_BYTES))):
                before += block.count(b"\n")
                left -= len(block)
            # The line that the part begins within, or before.
            before += 1
    return f"{part.file.name}:{before + number + 1}"


@contextlib.contextmanager
def _reader(file: SourceFile) -> Iterator[Any]:
    """A buffered stream of what the file holds, decompressed."""
    import pyarrow as pa

    with opened(file) as stream:
        codec = _compression(file)
        raw = pa.CompressedInputStream(stream, codec) if codec else stream
        try:
            yield io.BufferedReader(raw, _READ_BYTES)
        except OSError as error:
            if codec is None or error.errno is not None:
                raise
            reason = str(error).splitlines()[0]
            raise InputError(
                f"data file '{file.name}' is not a whole {codec} file: {reason}",
                hint="compress or copy it again",
                param="data.source.paths",
            ) from None


def _compression(file: SourceFile) -> str | None:
    return next((codec for end, codec in _COMPRESSION.items() if file.path.endswith(end)), None)
