"""The seam between the gateway and the models: arrays in and out, or token ids in and out.

`InProcessBackend` is the shipped fake: engines and functions in this very process. The real one,
over Ray Serve, is in `serve_backend.py`.

    backend = InProcessBackend(predictors={"digits.v1": runtime.run})
    outputs = await backend.predict("digits.v1", {"pixels": pixels})
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

from cluster.errors import UpstreamFailedError
from cluster.processing import Array
from serve_apps.llm.engine import Engine, EngineRequest, TokenOutput
from serve_apps.llm.runner import EngineRunner

Arrays = dict[str, Array]


class ModelBackend(Protocol):
    """Reaches the replicas of an application by its name, e.g. `digits.v3`."""

    async def predict(self, application: str, arrays: Arrays) -> Arrays:
        """One call with one batch. Raises UpstreamFailedError if a replica fails under it."""

    def generate(
        self, application: str, request: EngineRequest, *, drain_s: float
    ) -> AsyncGenerator[TokenOutput, None]:
        """Tokens as they come; closing the generator ends the work.

        Args:
            drain_s: how long a replica that has to go may go on with it.

        Raises:
            ReplicaLeavingError: that time is over, and another replica is to go on.
        """

    async def prepare(self, application: str) -> None:
        """Learn where its replicas are, so that no request has to wait for that; never raises."""

    def forget(self, application: str) -> None:
        """The application goes away: keep nothing of it."""


class InProcessBackend:
    """Models in this process, for tests and rehearsals without Ray."""

    def __init__(
        self,
        *,
        predictors: Mapping[str, Callable[[Arrays], Arrays]] | None = None,
        engines: Mapping[str, Engine] | None = None,
    ) -> None:
        self._predictors = dict(predictors or {})
        self._runners = {name: EngineRunner(engine) for name, engine in (engines or {}).items()}

    async def predict(self, application: str, arrays: Arrays) -> Arrays:
        predictor = self._predictors.get(application)
        if predictor is None:
            raise UpstreamFailedError(f"application '{application}' is not running")
        return await asyncio.to_thread(predictor, arrays)

    def generate(
        self, application: str, request: EngineRequest, *, drain_s: float
    ) -> AsyncGenerator[TokenOutput, None]:
        return self._runners[application].generate(request)

    async def prepare(self, application: str) -> None:
        pass

    def forget(self, application: str) -> None:
        self._predictors.pop(application, None)
        runner = self._runners.pop(application, None)
        if runner is not None:
            runner.close()

    def close(self) -> None:
        """Stop every engine."""
        for application in list(self._runners):
            self.forget(application)
