"""The one line of a log that best says why a process ended."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 64 * 1024
_MAX_CHARACTERS = 300
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TELLING = re.compile(r"^\s*(\w+\.)*\w*(Error|Exception)\b|\berror\b|in use|refused|denied", re.I)
_NOISE = re.compile(r'^\s*File "|^Traceback')


def last_words(log_path: Path) -> str:
    """The last line that speaks of an error, or else the last line; empty for an empty log."""
    try:
        data = log_path.read_bytes()[-_TAIL_BYTES:]
    except OSError:
        return ""
    text = _ANSI.sub("", data.decode("utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line) and not _NOISE.search(line)]
    return (telling or lines or [""])[-1][:_MAX_CHARACTERS]
