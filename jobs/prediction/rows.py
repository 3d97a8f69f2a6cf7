"""A row on its way: what was read, what came of it, and how that is written.

Row(7, "rows.jsonl:7", {"prompt": "Hello"})
Answered(row, {"text": " world"}), Refused(7, "rows.jsonl:8", "input 'x' is missing")
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

Values = dict[str, Any]
"""A row's values by column, as JSON has them; Parquet may add bytes."""


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    number: int
    """From 1, over all files of the input."""
    where: str
    """As messages call it."""
    values: Values


@dataclass(frozen=True)
class BadRow:
    """A row that got no answer."""

    number: int
    where: str
    reason: str
    kept: Values = field(default_factory=dict)
    """The columns that are kept, where the row could be read."""
    code: str = ""
    """`insufficient_quota` where the row is right, but nobody may pay for it now."""

    def record(self) -> Values:
        record = {"row": self.number, "where": self.where, "reason": self.reason}
        return {**_plain(self.kept), **record, **({"code": self.code} if self.code else {})}


def parse_line(line: bytes) -> Values:
    """The JSON object on a line.

    Raises:
        ValueError: it is none, or holds what could not be written again.
    """
    try:
        values = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is a JSON {type(values).__name__}, expected an object")
    return values


def to_json_lines(records: Sequence[Values]) -> bytes:
    """One JSON object a line."""
    lines = (json.dumps(_plain(record), ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode()


def to_parquet(records: Sequence[Values]) -> bytes:
    """A Parquet file; the columns are those of the records, which have the same ones."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(records)), sink)
    return sink.getvalue()


def _plain(record: Values) -> Values:
    """Without what JSON has no word for."""
    return {name: value if _is_json(value) else str(value) for name, value in record.items()}


def _is_json(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | dict | None)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
