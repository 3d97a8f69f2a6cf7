"""The states of a served version, and what gateways are told of them.

row.state in SERVING
snapshot.weights["digits"]       # {2: 0.95, 3: 0.05}
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

State = Literal[
    "deploying",
    "warming",
    "parity",
    "shadow",
    "canary",
    "champion",
    "standby",
    "rolled_back",
    "failed",
    "retiring",
    "retired",
]
Strategy = Literal["direct", "canary", "shadow"]
"""How it becomes champion: at once; with growing shares of the traffic; mirrored first."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

STARTING: tuple[State, ...] = ("deploying", "warming", "parity")
"""On its way to champion: not up yet, building its replicas, answering its golden inputs."""
COMPARED: tuple[State, ...] = ("shadow", "canary")
"""Up beside the champion, to be compared with it: on mirrored requests, or with a share of all."""
SERVING: tuple[State, ...] = ("champion", "standby", *COMPARED)
"""Ready to answer whoever asks for this version."""
OVER: tuple[State, ...] = ("rolled_back", "failed", "retired")
"""Kept to be looked at: its application is gone, or about to go."""

CONTROLLER = "controller"
"""Who acts where nobody asked for it."""


@dataclass(frozen=True)
class Deployment:
    """One served version of a model."""

    name: str
    version: int
    digest: str
    application: str
    """Name of its Serve application."""
    state: State
    reason: str
    """Why it is in this state, in one line."""
    options: dict[str, Any]
    created_at: str
    updated_at: str
    revision: int = 0
    """Grows with every change."""
    started_at: str | None = None
    """When Serve was asked for the application; None where one that is there is not this row's."""
    requested_by: str = CONTROLLER
    """Who asked for it."""
    release_id: str = ""
    """Another one each time that the version is asked for."""
    strategy: Strategy = "direct"
    step: int = 0
    """Counts the phases in which it is compared; each has evidence of its own."""
    share: float = 0.0
    """Of the name's traffic, in canary."""
    mirror_share: float = 0.0
    """Of the champion's requests that are mirrored to it, in shadow and canary."""
    is_paused: bool = False
    """Whether it takes no step towards champion until somebody says so."""
    sunset_at: str | None = None
    """When it ends, or ended, for a version whose users were given notice."""
    noticed_at: str | None = None
    """Since when they have known that; it stays when the end is moved."""

    @property
    def stage(self) -> str:
        """The state as people read it: a canary with its share."""
        shown = f"canary {self.share:.0%}" if self.state == "canary" else self.state
        return f"{shown}, paused" if self.is_paused else shown


@dataclass(frozen=True)
class RoutingSnapshot:
    """What gateways need, read in one transaction."""

    serving: tuple[Deployment, ...]
    weights: dict[str, dict[int, float]]
    """Shares of a name's traffic by version."""
    aliases: dict[tuple[str, str], int]
    shadows: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By name: the version that the champion's requests are mirrored to, and the share of them."""
    retired: tuple[Deployment, ...] = ()
    """Versions whose notice is over."""


def weights_of(rows: Iterable[Deployment]) -> dict[int, float]:
    """Shares of a model's traffic, which follow from the states of its versions."""
    rows = list(rows)
    champions = [row.version for row in rows if row.state == "champion"]
    canaries = {row.version: row.share for row in rows if row.state == "canary"}
    weights = canaries if champions else dict.fromkeys(canaries, 1.0)
    return weights | dict.fromkeys(champions, 1.0 - sum(canaries.values()))


def application_name(name: str, version: int) -> str:
    return f"{name}.v{version}"
