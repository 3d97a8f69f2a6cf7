"""What the gateway must know of each served version: its manifest and, for text, its tokenizer.

Loading means opening a verified package, so it happens in a thread, once per version, ahead of the
first request where possible.

    catalogue = ModelCatalogue(load)
    model = await catalogue.get(served)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import InputError
from cluster.model_package.manifest import LanguageModelInfo, Manifest
from cluster.processing.text import TextProcessor
from serve_apps.gateway.routing_table import Routes, ServedVersion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A served version with what its package says."""

    served: ServedVersion
    manifest: Manifest
    text: TextProcessor | None = None

    def require_graph(self) -> None:
        """Raises InputError for a language model."""
        if self.manifest.kind != "graph":
            raise InputError(
                f"model '{self.served.name}' is a language model, it takes no tensors",
                hint="call /v1/completions or /v1/chat/completions",
                param="model",
            )

    def require_text(self) -> tuple[TextProcessor, LanguageModelInfo]:
        """Raises InputError for a graph."""
        if self.text is None or self.manifest.language_model is None:
            raise InputError(
                f"model '{self.served.name}' is a {self.manifest.kind}, it generates no text",
                hint=f"call /v2/models/{self.served.name}/infer",
                param="model",
            )
        return self.text, self.manifest.language_model


Load = Callable[[ServedVersion], ServedModel]


class ModelCatalogue:
    """Loaded models by digest and version."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._models: dict[ServedVersion, asyncio.Task[ServedModel]] = {}

    async def get(self, served: ServedVersion) -> ServedModel:
        """The model, loaded now unless it is already; a failure is tried anew next time."""
        task = self._task(served)
        try:
            # Shielded, so that one client leaving does not cancel the others' loading.
            return await asyncio.shield(task)
        except Exception:
            if self._models.get(served) is task:
                del self._models[served]
            raise

    def follow(self, routes: Routes) -> None:
        """Load what is newly served and forget what no longer is."""
        current = set(routes.served.values())
        for gone in set(self._models) - current:
            del self._models[gone]
        for served in current:
            self._task(served).add_done_callback(_log_failure)

    def _task(self, served: ServedVersion) -> asyncio.Task[ServedModel]:
        task = self._models.get(served)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._load, served))
            self._models[served] = task
        return task


def _log_failure(task: asyncio.Task[ServedModel]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.warning("a served package cannot be opened: %s", task.exception())
