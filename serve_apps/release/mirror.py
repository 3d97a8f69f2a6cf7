"""Shows in MLflow what becomes of releases: the aliases, and each version's last event.

MLflow may be slow or away; nothing waits for it, and what it missed it is told the next time.

    mirror = ReleaseMirror(store, registry)
    mirror.show("digits")                # returns at once
"""

from __future__ import annotations

import asyncio
import logging

from cluster.errors import HeliostatError
from cluster.registry import ModelRegistry
from cluster.releases import ReleaseStore

logger = logging.getLogger(__name__)


class ReleaseMirror:
    """Tells MLflow about one model after the other."""

    def __init__(self, store: ReleaseStore, registry: ModelRegistry) -> None:
        self._store = store
        self._registry = registry
        self._names: set[str] = set()
        self._told: dict[tuple[str, int], str] = {}
        self._task: asyncio.Task[None] | None = None

    def show(self, name: str) -> None:
        """Show a model as it will be when MLflow's turn comes."""
        self._names.add(name)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._show_all())

    async def _show_all(self) -> None:
        while self._names:
            name = self._names.pop()
            try:
                await asyncio.to_thread(self._show, name)
            except Exception:
                logger.exception("the release of '%s' is not shown in MLflow", name)

    def _show(self, name: str) -> None:
        self._registry.mirror_aliases(name)
        last = {event.version: event for event in self._store.events(name)}
        for version, event in last.items():
            text = f"{event.state} since {event.at}, by {event.actor}: {event.reason}"
            if self._told.get((name, version)) == text:
                continue
            try:
                self._registry.show_release(name, version, text)
            except HeliostatError as error:
                logger.warning("%s/%d is not shown in MLflow yet: %s", name, version, error)
                return
            self._told[name, version] = text
