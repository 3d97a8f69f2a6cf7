"""How our processes write their logs: lines for people or JSON for machines.

configure_logging("json")
logging.getLogger(__name__).info("deployed", extra={"model": "digits", "version": 3})
# {"at": "…", "level": "INFO", "logger": "…", "event": "deployed", "model": "digits", …}
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

# What every record has; whatever else it has came from `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

request_id_of_logs: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Goes into every record that is written while it is set."""


def configure_logging(
    form: Literal["text", "json"] = "text", level: str = "INFO", *, in_replica: bool = False
) -> None:
    """Send this process's logs to stderr, once; a second call replaces the first.

    Args:
        in_replica: write past Ray Serve, which in its replicas takes stderr for itself, holds lines
            back until there are a thousand, and puts words of its own before each.
    """
    handler = logging.StreamHandler(sys.__stderr__ if in_replica else sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "at": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time level logger event key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name} {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    # Ray gives every record a private field of its own.
    fields = {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_")
    }
    request_id = request_id_of_logs.get()
    return fields if request_id is None else {"request_id": request_id, **fields}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
