"""Parquet and Arrow files: a document per row, read a few rows at a time.

Arrow files may be of the IPC file format, which has an index, or the stream format (as Hugging Face
`datasets` writes it), which is read from its beginning. It knows nothing about tokens.

    for part in plan_parts(source, file):
        for document in read_part(source, part): …
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from cluster.errors import InputError
from jobs.data.config import ColumnarSource
from jobs.data.documents import Document, Locate, check_text, missing_field
from jobs.data.locations import SourceFile, opened
from jobs.data.parts import Part

_ROWS_AT_ONCE = 256
_STREAM = -1
"""End of a part that is a whole Arrow stream."""
_CONTINUATION = b"\xff" * 4
_END_MARK = _CONTINUATION + b"\0" * 4


def plan_parts(source: ColumnarSource, file: SourceFile, part_bytes: int) -> list[Part]:
    """Row groups or record batches, from the file's footer; small ones together.

    Raises:
        InputError: it is not such a file, or has no such text field.
    """
    with opened(file) as stream, _format_errors(source, file):
        plan = _plan_parquet if source.kind == "parquet" else _plan_arrow
        return _joined(plan(source, file, stream), part_bytes)


def read_part(source: ColumnarSource, part: Part) -> Iterator[Document]:
    """Documents of a part, by row."""
    read = _read_parquet if source.kind == "parquet" else _read_arrow
    row = part.first_row
    with opened(part.file) as stream:
        for cell in _cells(source, part.file, read(source, part, stream)):
            row += 1
            locate = functools.partial(_locate, part, row)
            record = {source.text_field: _value(cell, source.text_field, locate)}
            yield Document(check_text(record, source.text_field, locate), locate)


def _plan_parquet(source: ColumnarSource, file: SourceFile, stream: Any) -> list[Part]:
    from pyarrow import parquet

    found = parquet.ParquetFile(stream)
    _check_schema(source, file, found.schema_arrow)
    parts: list[Part] = []
    row = 0
    for number in range(found.metadata.num_row_groups):
        group = found.metadata.row_group(number)
        parts.append(Part(file, number, number + 1, group.total_byte_size, row))
        row += group.num_rows
    return parts


def _plan_arrow(source: ColumnarSource, file: SourceFile, stream: Any) -> list[Part]:
    import pyarrow as pa

    try:
        found = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        _check_schema(source, file, pa.ipc.open_stream(stream).schema)
        return [Part(file, 0, _STREAM, file.size_bytes)]
    _check_schema(source, file, found.schema)
    count = found.num_record_batches
    # The footer does not say how many rows or bytes a batch has.
    return [Part(file, i, i + 1, file.size_bytes // count) for i in range(count)]


def _joined(parts: list[Part], part_bytes: int) -> list[Part]:
    """Neighbours become one part up to a size, since opening a file costs a request or two."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and last.size_bytes + part.size_bytes <= part_bytes:
            size = last.size_bytes + part.size_bytes
            joined[-1] = dataclasses.replace(last, end=part.end, size_bytes=size)
        else:
            joined.append(part)
    return joined


def _read_parquet(source: ColumnarSource, part: Part, stream: Any) -> Iterator[Any]:
    from pyarrow import parquet

    yield from parquet.ParquetFile(stream).iter_batches(
        batch_size=_ROWS_AT_ONCE,
        row_groups=list(range(part.start, part.end)),
        columns=[source.text_field],
        use_threads=False,
    )


def _read_arrow(source: ColumnarSource, part: Part, stream: Any) -> Iterator[Any]:
    import pyarrow as pa

    if part.end == _STREAM:
        yield from pa.ipc.open_stream(stream)
        _check_end(stream)
        return
    found = pa.ipc.open_file(stream)
    for number in range(part.start, part.end):
        yield found.get_batch(number)


def _check_end(stream: Any) -> None:
    """Arrow takes the file's end for the stream's, but writers mark it (format 0.15 and later)."""
    end = stream.tell()
    stream.seek(0)
    is_marked = stream.read(len(_CONTINUATION)) == _CONTINUATION
    stream.seek(end - len(_END_MARK))
    if is_marked and stream.read(len(_END_MARK)) != _END_MARK:
        raise EOFError


def _cells(source: ColumnarSource, file: SourceFile, batches: Iterator[Any]) -> Iterator[Any]:
    """The text field's cells, as Arrow's scalars."""
    with _format_errors(source, file):
        for batch in batches:
            yield from batch.column(source.text_field)


def _value(cell: Any, field: str, locate: Locate) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{locate()}': field '{field}' is not UTF-8 text (byte {error.start})",
            hint="write the file again with text that is UTF-8",
            param="data.source.paths",
        ) from None


def _check_schema(source: ColumnarSource, file: SourceFile, schema: Any) -> None:
    import pyarrow as pa

    if source.text_field not in schema.names:
        raise missing_field(file.name, source.text_field, schema.names)
    if schema.names.count(source.text_field) > 1:
        raise InputError(
            f"'{file.name}' has {schema.names.count(source.text_field)} fields named "
            f"'{source.text_field}', expected one",
            hint="rename the others, or choose another data.source.text_field",
            param="data.source.text_field",
        )
    kind = schema.field(source.text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(
            f"'{file.name}': field '{source.text_field}' holds {kind}, expected text",
            hint="correct data.source.text_field",
            param="data.source.text_field",
        )


@contextlib.contextmanager
def _format_errors(source: ColumnarSource, file: SourceFile) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except InputError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(
            f"data file '{file.name}' is not a whole {source.kind.capitalize()} file: "
            f"{(str(error).splitlines() or ['it ends too early'])[0]}",
            hint="write or copy it again, or correct data.source.kind",
            param="data.source.paths",
        ) from None


def _locate(part: Part, row: int) -> str:
    is_counted_from_a_batch = part.start > 0 and part.first_row == 0
    start = f" from record batch {part.start}" if is_counted_from_a_batch else ""
    return f"{part.file.name}, row {row}{start}"
