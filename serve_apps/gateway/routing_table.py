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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from cluster.errors import GoneError, NotFoundError
from cluster.model_ref import ModelRef
from cluster.releases import COMPARED, Deployment, ReleaseStore, RoutingSnapshot, State
from serve_apps.gateway.notices import Notice
from serve_apps.gateway.releases.release import Release
from serve_apps.gateway.stickiness import share_of, version_at
from serve_apps.options import DeploymentOptions, of_replicas

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


Customer = Callable[[], str]
"""Says who asks, if that matters."""


def nobody() -> str:
    """Where a version is named."""
    return ""


@dataclass(frozen=True)
class Routes:
    """What is served at one moment."""

    served: Mapping[tuple[str, int], ServedVersion] = field(default_factory=dict)
    weights: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Shares of the traffic that names no version or alias."""
    aliases: Mapping[tuple[str, str], int] = field(default_factory=dict)
    releases: Mapping[str, Release] = field(default_factory=dict)
    """Those under way, by name."""
    notices: Mapping[tuple[str, int], Notice] = field(default_factory=dict)
    """Of versions that will end, or have ended, with notice."""

    def names(self) -> list[str]:
        """Names that have traffic."""
        return sorted(name for name, weights in self.weights.items() if weights)

    def versions(self, name: str) -> list[int]:
        return sorted(version for found, version in self.served if found == name)

    def resolve(self, ref: ModelRef, customer: Customer) -> ServedVersion:
        """The version that answers a customer, who stays with it while its weight grows.

        Raises:
            NotFoundError: nothing is served under this reference.
            GoneError: nothing is any more, as was said before.
        """
        version = ref.version
        if ref.alias is not None:
            version = self.aliases.get((ref.name, ref.alias))
        elif version is None:
            version = self._weighted(ref.name, customer)
        served = None if version is None else self.served.get((ref.name, version))
        if self.notices:
            self._refuse_ended(ref, version)
        if served is None:
            raise self._not_served(ref, version)
        return served

    def _weighted(self, name: str, customer: Customer) -> int | None:
        weights = self.weights.get(name, {})
        if len(weights) <= 1:
            return next(iter(weights), None)
        return version_at(weights, share_of(customer(), name, weights))

    def _refuse_ended(self, ref: ModelRef, version: int | None) -> None:
        if version is None:
            noted = [notice for (name, _), notice in self.notices.items() if name == ref.name]
            if not noted or self.versions(ref.name):
                return
            notice = max(noted, key=lambda each: each.ends_at_s)
        else:
            found = self.notices.get((ref.name, version))
            if found is None:
                return
            if (ref.name, version) in self.served and time.time() < found.ends_at_s:
                return
            notice = found
        others = ", ".join(str(v) for v in self.versions(ref.name) if v != version)
        shown = ref.name if ref.version is None and ref.alias is None else str(ref)
        raise GoneError(
            f"model '{shown}' is gone; its end was announced for {notice.ends_at}",
            hint=f"versions still served are: {others}" if others else "ask for another model",
            param="model",
        )

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

    async def resolve(self, ref: ModelRef, customer: Customer = nobody) -> ServedVersion:
        """As `Routes.resolve`, looking once more for what was deployed a moment ago."""
        try:
            return self.current.resolve(ref, customer)
        except (NotFoundError, GoneError):
            await self.refresh()
            return self.current.resolve(ref, customer)

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
        releases=_releases(snapshot),
        notices={
            (row.name, row.version): Notice.read(row.noticed_at, row.sunset_at)
            for row in (*snapshot.serving, *snapshot.retired)
            if row.sunset_at is not None and row.noticed_at is not None
        },
    )


def _releases(snapshot: RoutingSnapshot) -> dict[str, Release]:
    champions = {row.name: row.version for row in snapshot.serving if row.state == "champion"}
    return {
        row.name: Release(
            row.name,
            champions[row.name],
            row.version,
            row.release_id,
            row.step,
            snapshot.shadows.get(row.name, (row.version, 0.0))[1],
        )
        for row in snapshot.serving
        if row.state in COMPARED and row.name in champions
    }


def _served(row: Deployment) -> ServedVersion:
    try:
        # The others would make it another version, with new queues.
        options = DeploymentOptions.model_validate(of_replicas(row.options))
    except ValidationError:  # written by another release of this code
        options = DeploymentOptions()
    return ServedVersion(row.name, row.version, row.digest, row.application, row.state, options)
