"""`ReleaseOptions`: how a version is compared with the champion before it takes its place.

The section `release` of `configs/serve/*.yaml`; docs/releases.md says what to choose.

    options = ReleaseOptions(steps=(0.1, 0.5), max_duration_s=600)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from cluster.config import StrictModel

_DAY_S = 86_400


class Margins(StrictModel):
    """How much worse than the champion a version may be; all from 0 to 1.

    The first four are shares of requests or tokens, and it is the difference from the champion's
    share that is limited. The others compare both answers to the same request: their mean is.
    """

    errors: float = Field(0.02, gt=0, lt=1)
    """Requests that fail, or whose answer is no number."""
    slow: float = Field(0.05, gt=0, lt=1)
    """Answers slower than nearly all of the champion's."""
    slow_first_token: float = Field(0.05, gt=0, lt=1)
    """Streams whose first token is."""
    slow_token: float = Field(0.05, gt=0, lt=1)
    """Tokens after the first that are."""
    label_disagreement: float = Field(0.1, gt=0, lt=1)
    """Another class, or another number by more than the tolerance."""
    score_distance: float = Field(0.1, gt=0, lt=1)
    """Between the two answers' scores."""
    token_disagreement: float = Field(0.5, gt=0, lt=1)
    """Tokens that differ; after the first that does, most do."""
    logprob_divergence: float = Field(0.25, gt=0, lt=1)
    """Between the log-probabilities of tokens."""


class ReleaseOptions(StrictModel):
    """What decides a release, for the strategies `canary` and `shadow`."""

    alpha: float = Field(0.05, gt=0, le=0.5)
    """Greatest chance that a version within all margins is rolled back, over the whole release;
    also that one beyond a margin passes as no worse."""
    margins: Margins = Margins()
    steps: tuple[float, ...] = Field((0.05, 0.25, 0.5), min_length=1, max_length=10)
    """Shares of the traffic that a canary has, one after the other."""
    mirror_share: float = Field(0.25, gt=0, le=1)
    """Of the champion's requests, answered by the new version too where there is room, to compare
    the answers."""
    min_observations: int = Field(100, ge=1, le=10**9)
    """Answers of the new version in a phase, before the next one begins."""
    max_duration_s: float = Field(3600, gt=0, le=366 * _DAY_S)
    """A phase that nothing has decided by then ends: see without_traffic."""
    without_traffic: Literal["wait", "promote", "roll_back"] = "wait"
    """After max_duration_s with fewer than min_observations: wait for more, go on to the next
    phase, or give the version up. With as many, it goes on: nothing speaks against it."""

    @field_validator("steps")
    @classmethod
    def _shares_that_grow(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share < 1 for share in value) or list(value) != sorted(set(value)):
            shown = ", ".join(f"{share:g}" for share in value)
            raise ValueError(f"is {shown}, expected shares between 0 and 1 that grow")
        return value
