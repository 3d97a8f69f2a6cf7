"""Which releases concern a gateway now. Without any, it is one look into an empty dictionary.

watch = ReleaseWatch(evidence, catalogue, backend, has_room)
watch.follow(routes)
watched = watch.of(model.served)                 # None nearly always
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from cluster.release_evidence import Arm
from serve_apps.gateway.backend import ModelBackend
from serve_apps.gateway.catalogue import ModelCatalogue
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.releases.observer import Observer
from serve_apps.gateway.releases.watched import WatchedRelease
from serve_apps.gateway.routing_table import Routes, ServedVersion


class ReleaseWatch:
    """Every release under way.

    Args:
        has_room: whether the customers of a version leave room for other work at this moment.
    """

    def __init__(
        self,
        evidence: Evidence,
        catalogue: ModelCatalogue,
        backend: ModelBackend,
        has_room: Callable[[ServedVersion], bool],
    ) -> None:
        self._evidence = evidence
        self._catalogue = catalogue
        self._backend = backend
        self._has_room = has_room
        self._watched: dict[str, WatchedRelease] = {}
        self._observers: dict[str, tuple[Observer, Arm]] = {}

    def of(self, served: ServedVersion) -> WatchedRelease | None:
        """The release that a version takes part in."""
        watched = self._watched.get(served.name)
        return None if watched is None or watched.arm_of(served) is None else watched

    def observer_of(self, application: str) -> tuple[Observer, Arm] | None:
        """As `of`, by the application's name."""
        return self._observers.get(application)

    def follow(self, routes: Routes) -> None:
        """Begin with new releases, and let go of those that are over."""
        before, self._watched, self._observers = self._watched, {}, {}
        for name, release in routes.releases.items():
            champion = routes.served.get((name, release.champion))
            candidate = routes.served.get((name, release.candidate))
            if champion is None or candidate is None:
                continue
            watched = before.get(name)
            if watched is not None and watched.goes_on_as(release, champion, candidate):
                del before[name]
            else:
                has_room = functools.partial(self._has_room, champion)
                watched = WatchedRelease(
                    release, champion, candidate, self._evidence, self._catalogue, self._backend,
                    has_room,
                )  # fmt: skip
            self._watched[name] = watched
            self._observers[champion.application] = watched.observer, "champion"
            self._observers[candidate.application] = watched.observer, "candidate"
        for over in before.values():
            over.close()
