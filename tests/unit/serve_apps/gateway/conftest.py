"""The gateway behind real sockets, for clients that bring their own connections, and in a release:
a candidate beside classes/2 or talker/1, and what is seen of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from cluster.ledger import Ledger
from serve_apps.gateway import streams
from serve_apps.gateway.releases.release import Release
from serve_apps.gateway.routing_table import ServedVersion
from serve_apps.llm.runner import EngineRunner
from serve_apps.options import DeploymentOptions

DIGEST = "sha256:" + "1" * 64


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that no replica goes on with is given up sooner."""
    monkeypatch.setattr(streams, "PAUSES_S", (0.0, 0.01, 0.05))


@pytest.fixture
async def http_address(gateway: Any) -> AsyncIterator[str]:
    """HOST:PORT of the same application behind a real HTTP server."""
    config = uvicorn.Config(gateway.app, port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


@pytest.fixture
async def grpc_address(gateway: Any) -> str:
    """HOST:PORT of the gateway's gRPC server."""
    return f"127.0.0.1:{gateway.app.state.grpc_server.port}"


@dataclass
class Trial:
    """Begins releases, and reads what came of them."""

    gateway: Any

    async def graph(
        self, predict: Callable[..., Any], *, weight: float = 0.0, mirrored: float = 0.0
    ) -> None:
        """classes/3 on trial beside classes/2."""
        self.gateway.backend._predictors["classes.v3"] = predict
        await self.begin("classes", 2, 3, weight=weight, mirrored=mirrored)

    async def engine(self, engine: Any, *, weight: float = 0.0, mirrored: float = 0.0) -> None:
        """talker/2 on trial beside talker/1."""
        self.gateway.backend._runners["talker.v2"] = EngineRunner(engine)
        await self.begin("talker", 1, 2, weight=weight, mirrored=mirrored)

    async def begin(
        self,
        name: str,
        champion: int,
        candidate: int,
        *,
        weight: float = 0.0,
        mirrored: float = 0.0,
        digest: str = DIGEST,
        shares_base: bool = False,
    ) -> None:
        """What the controller would write, taken by the gateway."""
        routes = self.gateway.routes
        served = ServedVersion(
            name,
            candidate,
            digest,
            f"{name}.v{candidate}",
            state="canary" if weight else "shadow",
            options=DeploymentOptions(request_timeout_s=5, shares_base=shares_base),
        )
        weights = {champion: 1 - weight, candidate: weight} if weight else {champion: 1.0}
        await self.gateway.route(
            served={**routes.served, (name, candidate): served},
            weights={**routes.weights, name: weights},
            releases={name: Release(name, champion, candidate, "rel_1", 1, mirrored)},
        )
        # Opening the package takes a moment, and no request of a test is to wait for it.
        await self.gateway.app.state.models.open(f"{name}/{candidate}")

    def value(self, name: str, /, **labels: str) -> float:
        registry = self.gateway.telemetry.instruments.registry
        return float(registry.get_sample_value(f"heliostat_{name}", labels) or 0)

    def seen(self, model: str, arm: str, metric: str) -> tuple[float, float]:
        """Number and sum of the observations."""
        name, version = model.split("/")
        labels = {"model": name, "version": version, "arm": arm, "metric": metric}
        return (
            self.value("release_observations_total", **labels),
            self.value("release_badness_total", **labels),
        )

    def mirrored(self, model: str, outcome: str) -> float:
        name, version = model.split("/")
        return self.value("mirrored_requests_total", model=name, version=version, outcome=outcome)

    async def until_mirrored(self, model: str, num: int = 1) -> None:
        """So many mirrored requests were compared or failed."""
        async with asyncio.timeout(15):
            while self._num_asked(model) < num:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def until_seen(self, model: str, arm: str, metric: str, num: int = 1) -> None:
        """There are so many observations."""
        async with asyncio.timeout(15):
            while self.seen(model, arm, metric)[0] < num:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def _num_asked(self, model: str) -> float:
        return self.mirrored(model, "compared") + self.mirrored(model, "failed")

    async def bill(self, num_requests: int) -> dict[tuple[str, int | None], tuple[int, int, int]]:
        """Requests, prompt and completion tokens by model and version, once so many are there."""
        ledger = Ledger(self.gateway.database)
        async with asyncio.timeout(15):
            while True:
                totals = await asyncio.to_thread(ledger.totals, by=("version",))
                if sum(total.num_requests for total in totals) >= num_requests:
                    break
                await asyncio.sleep(0.02)
        return {
            (total.model, total.version): (
                total.num_requests, total.prompt_tokens, total.completion_tokens,
            )
            for total in totals
        }  # fmt: skip


@pytest.fixture
def trial(gateway: Any) -> Trial:
    return Trial(gateway)
