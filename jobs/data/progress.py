"""Progress lines: how far a preparation is, at most one every few seconds.

It knows nothing about what is counted.

    progress = Progress("reading", total_bytes=10**9, say=print)
    progress.add(documents=100, size_bytes=10**6)
"""

from __future__ import annotations

import time
from collections.abc import Callable

_INTERVAL_S = 5.0


class Progress:
    """Counts of one pass over a corpus."""

    def __init__(
        self,
        doing: str,
        *,
        total_bytes: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._doing = doing
        self._total_bytes = total_bytes
        self._say = say
        self._clock = clock
        self._start_s = self._said_s = clock()
        self._documents = self._bytes = self._tokens = 0

    def add(self, *, documents: int = 0, size_bytes: int = 0, tokens: int = 0) -> None:
        self._documents += documents
        self._bytes += size_bytes
        self._tokens += tokens
        now_s = self._clock()
        if now_s - self._said_s >= _INTERVAL_S:
            self._said_s = now_s
            self._say(self.line())

    def line(self) -> str:
        """What has been done so far, and how fast."""
        elapsed_s = max(self._clock() - self._start_s, 1e-9)
        parts = [f"{self._documents:,} documents", f"{self._bytes / 1e6:,.1f} MB"]
        if self._total_bytes:
            parts[-1] += f" ({min(1.0, self._bytes / self._total_bytes):.0%})"
        if self._tokens:
            parts.append(f"{self._tokens:,} tokens ({self._tokens / elapsed_s:,.0f}/s)")
        else:
            parts.append(f"{self._bytes / 1e6 / elapsed_s:,.1f} MB/s")
        return f"{self._doing}: " + ", ".join(parts)
