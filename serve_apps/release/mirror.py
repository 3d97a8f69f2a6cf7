"""Shows in MLflow what becomes of releases: the aliases, and each version's last event.

MLflow may be slow or away; nothing waits for it, and what it missed it is told as soon as it is
back.

    mirror = ReleaseMirror(store, registry)
    mirror.show("digits")                # returns at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from cluster.errors import HeliostatError
from cluster.registry import ModelRegistry
from cluster.releases import ReleaseStore

logger = logging.getLogger(__name__)

_RETRY_S = 30.0


class ReleaseMirror:
    """Tells MLflow about one model after the other."""

    def __init__(self, store: ReleaseStore, registry: ModelRegistry) -> None:
        self._store = store
        self._registry = registry
        self._names: set[str] = set()
        self._told: dict[tuple[str, int], str] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def show(self, name: str) -> None:
        """Show a model as it will be when MLflow's turn comes."""
        self._names.add(name)
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._show_all())

    async def _show_all(self) -> None:
        while self._names:
            self._wake.clear()
            names, self._names = self._names, set()
            missed = {name for name in sorted(names) if not await self._try(name)}
            if missed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await self._wake.wait()
                self._names |= missed

    async def _try(self, name: str) -> bool:
        try:
            return await asyncio.to_thread(self._show, name)
        except Exception:
            logger.exception("the release of '%s' is not shown in MLflow", name)
            return False

    def _show(self, name: str) -> bool:
        """Whether MLflow has taken all of it."""
        self._registry.mirror_aliases(name)
        known = {version.version for version in self._registry.list_versions(name)}
        # Of versions that were deleted, MLflow has no page any more.
        last = {
            event.version: event for event in self._store.events(name) if event.version in known
        }
        is_told = True
        for version, event in last.items():
            text = f"{event.state} since {event.at}, by {event.actor}: {event.reason}"
            if self._told.get((name, version)) == text:
                continue
            try:
                self._registry.show_release(name, version, text)
            except HeliostatError as error:
                logger.warning("%s/%d is not shown in MLflow yet: %s", name, version, error)
                is_told = False
            else:
                self._told[name, version] = text
        return is_told
