"""A release under way, as a gateway sees it: a version on trial beside the champion.

release = Release("digits", champion=3, candidate=4, id="rel_1", step=1, mirrored_share=0.2)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """Both versions are served; what is observed of them belongs to a step of it."""

    name: str
    champion: int
    candidate: int
    id: str
    step: int
    mirrored_share: float = 0.0
    """Share of the champion's requests that the candidate is asked as well, to compare."""
