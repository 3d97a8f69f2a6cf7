"""`CacheBudget`: bounds on what an engine takes of a machine.

CacheBudget(max_cache_bytes=256 * 1024**2, max_running=16)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheBudget:
    """Bounds on what the engine takes; without them transformers takes 60 % of all memory, and
    the first request waits seconds for it (6.5 s on 24 GiB, against 0.06 s; 2 CPU cores)."""

    max_cache_bytes: int = 512 * 1024**2
    max_running: int = 32
    max_batch_tokens: int = 512
