"""Who answers for a model's name: a snapshot of the SQL tables, polled, never waited for.

`Routes` is pure data with one decision, `resolve`. `RoutingTable` keeps the newest snapshot and
goes on with the last one while the database is away.

    table = RoutingTable(lambda: read_routes(store))
    served = await table.resolve(ModelRef.parse("digits"))
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from cluster.errors import NotFoundError
from cluster.model_ref import ModelRef
from cluster.releases import Deployment, ReleaseStore, State
from serve_apps.options import DeploymentOptions

logger = logging.getLogger(__name__)

_POLL_PERIOD_S = 0.25
_MIN_REFRESH_PERIOD_S = 0.05


@dataclass(frozen=True)
class ServedVersion:
    """A version that replicas are up for."""

    name: str
    version: int
    digest: str
    application: str
    state: State = field(default="champion", compare=False)
    # Not hashed: that would take longer than all the look-ups together.
    options: DeploymentOptions = field(default_factory=DeploymentOptions, hash=False)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class Routes:
    """What is served at one moment."""

    served: Mapping[tuple[str, int], ServedVersion] = field(default_factory=dict)
    weights: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Shares of the traffic that names no version or alias."""
    aliases: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Names that have traffic."""
        return sorted(name for name, weights in self.weights.items() if weights)

    def versions(self, name: str) -> list[int]:
        return sorted(version for found, version in self.served if found == name)

    def resolve(self, ref: ModelRef, draw: float) -> ServedVersion:
        """The version that answers; `draw`, from [0, 1), chooses among weighted ones.

        Raises:
            NotFoundError: nothing is served under this reference.
        """
        version = ref.version
        if ref.alias is not None:
            version = self.aliases.get((ref.name, ref.alias))
        elif version is None:
            version = _weighted(self.weights.get(ref.name, {}), draw)
        served = None if version is None else self.served.get((ref.name, version))
        if served is None:
            raise self._not_served(ref, version)
        return served

    def _not_served(self, ref: ModelRef, version: int | None) -> NotFoundError:
        versions = ", ".join(str(v) for v in self.versions(ref.name))
        if ref.alias is not None and version is not None:
            message = f"model '{ref}' is version {version}, which is not deployed"
        elif versions and (ref.alias is not None or ref.version is not None):
            message = f"model '{ref}' is not deployed; deployed versions are: {versions}"
        else:
            names = ", ".join(self.names())
            message = f"model '{ref.name}' is not deployed; there are: {names or 'none yet'}"
        return NotFoundError(message, hint="deploy it with `heliostat deploy REF`", param="model")


class RoutingTable:
    """The newest snapshot, kept fresh by a task."""

    def __init__(self, read: Callable[[], Routes]) -> None:
        self._read = read
        self._lock = asyncio.Lock()
        self._read_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._is_stale = False
        self.current = Routes()
        self.is_ready = False
        """Whether the tables have been read at least once."""
        self.on_change: list[Callable[[Routes], None]] = []
        """Called in the event loop with each new snapshot that differs from the last."""

    async def start(self) -> None:
        """Begin polling; returns at once, even while the database is away."""
        if self._task is None:
            self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def resolve(self, ref: ModelRef) -> ServedVersion:
        """As `Routes.resolve`, looking once more for what was deployed a moment ago."""
        # Spreads traffic; nothing secret depends on it.
        draw = random.random()  # noqa: S311
        try:
            return self.current.resolve(ref, draw)
        except NotFoundError:
            await self.refresh()
            return self.current.resolve(ref, draw)

    async def refresh(self) -> None:
        """Read the tables now, unless that was done a moment ago."""
        async with self._lock:
            if time.monotonic() - self._read_at < _MIN_REFRESH_PERIOD_S:
                return
            try:
                routes = await asyncio.to_thread(self._read)
            except Exception as error:
                if not self._is_stale:
                    logger.warning("routing table is stale, the database is away: %s", error)
                self._is_stale = True
                return
            finally:
                self._read_at = time.monotonic()
            self._is_stale, self.is_ready = False, True
            self._take(routes)

    def _take(self, routes: Routes) -> None:
        if routes == self.current:
            return
        self.current = routes
        logger.info("routes changed: %s", {n: dict(w) for n, w in routes.weights.items()})
        for listener in self.on_change:
            try:
                listener(routes)
            except Exception:
                logger.exception("a listener failed on new routes")

    async def _poll(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_POLL_PERIOD_S)


def read_routes(store: ReleaseStore) -> Routes:
    """One consistent snapshot of the tables."""
    snapshot = store.snapshot()
    return Routes(
        served={(row.name, row.version): _served(row) for row in snapshot.serving},
        weights=snapshot.weights,
        aliases=snapshot.aliases,
    )


def _served(row: Deployment) -> ServedVersion:
    try:
        options = DeploymentOptions.model_validate(row.options)
    except ValidationError:  # written by another release of this code
        options = DeploymentOptions()
    return ServedVersion(row.name, row.version, row.digest, row.application, row.state, options)


def _weighted(weights: Mapping[int, float], draw: float) -> int | None:
    total = sum(weights.values())
    threshold = draw * total
    for version, weight in sorted(weights.items()):
        if threshold < weight:
            return version
        threshold -= weight
    return max(weights, default=None)
