"""`Description`: what a replica says of itself. It crosses applications, so it needs no Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """A replica's word that it serves this package, on this device."""

    digest: str
    device: str
    """"cpu" or "cuda"."""
