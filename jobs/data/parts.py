"""A part of a file, the unit that is read without what comes before it.

It knows nothing about formats.

    Part(file, start=0, end=1 << 25, size_bytes=1 << 25)
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.data.locations import SourceFile


@dataclass(frozen=True)
class Part:
    file: SourceFile
    start: int
    end: int
    """First, and one past the last: bytes, row groups or record batches, as the format counts."""
    size_bytes: int
    """About how much there is to read."""
    first_row: int = 0
    """For rows: how many the file has before this part."""
