"""The gateway behind real sockets, for clients that bring their own connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from serve_apps.gateway import streams


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
