"""Which releases concern a gateway now. Without any, it is one look into an empty dictionary.

watch = ReleaseWatch(evidence, means)
watch.follow(routes)
watched = watch.of(model.served)                 # None nearly always
"""

from __future__ import annotations

from cluster.release_evidence import Arm
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.releases.observer import Observer
from serve_apps.gateway.releases.shadow import Means
from serve_apps.gateway.releases.watched import WatchedRelease
from serve_apps.gateway.routing_table import Routes, ServedVersion


class ReleaseWatch:
    """Every release under way."""

    def __init__(self, evidence: Evidence, means: Means) -> None:
        self._evidence = evidence
        self._means = means
        self._watched: dict[str, WatchedRelease] = {}
        self._observers: dict[str, tuple[Observer, Arm]] = {}

    def of(self, served: ServedVersion) -> WatchedRelease | None:
        """The release that a version takes part in."""
        watched = self._watched.get(served.name)
        return None if watched is None or watched.arm_of(served) is None else watched

    def observer_of(self, key: str) -> tuple[Observer, Arm] | None:
        """As `of`, by the application's name, or the digest of an adapter that has none."""
        return self._observers.get(key)

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
                watched = WatchedRelease(release, champion, candidate, self._evidence, self._means)
            self._watched[name] = watched
            self._observers[_key(champion)] = watched.observer, "champion"
            self._observers[_key(candidate)] = watched.observer, "candidate"
        for over in before.values():
            over.close()


def _key(served: ServedVersion) -> str:
    return served.digest if served.options.shares_base else served.application
