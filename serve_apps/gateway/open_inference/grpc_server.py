"""The gateway's own gRPC server, beside its HTTP: one port, shared by all gateway replicas of a
machine.

Ray Serve's own would open a second door to every model, on all interfaces.

    server = GrpcServer(InferenceService(models), Door(keys, callers), address, max_message_bytes=…)
    await server.start()
    await server.stop()
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.errors import PortInUseError
from serve_apps.gateway.open_inference.grpc_calls import Door
from serve_apps.gateway.open_inference.grpc_service import InferenceService

logger = logging.getLogger(__name__)

_MAX_CALLS = 4096
_MAX_CALLS_PER_CONNECTION = 1024
_MAX_CONNECTIONS = 4096
_HANDSHAKE_TIMEOUT_S = 10
_MAX_IDLE_S = 600
_PATIENCE_S = 10.0
"""For calls under way when the server stops; less than Serve gives a replica."""


@dataclass(frozen=True)
class GrpcAddress:
    """Where to listen; port 0 takes any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class GrpcServer:
    """Listens from `start` to `stop`, in the event loop that starts it."""

    def __init__(
        self,
        service: InferenceService,
        door: Door,
        address: GrpcAddress,
        *,
        max_message_bytes: int,
    ) -> None:
        self._service = service
        self._door = door
        self._address = address
        self._max_message_bytes = max_message_bytes
        self._server: Any = None
        self.port = address.port

    async def start(self) -> None:
        """Raises PortInUseError if somebody other than a gateway replica listens there."""
        server = grpc.aio.server(
            interceptors=[self._door],
            maximum_concurrent_rpcs=_MAX_CALLS,
            options=[
                ("grpc.so_reuseport", 1),
                # Of a compressed message too, before and after.
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_concurrent_streams", _MAX_CALLS_PER_CONNECTION),
                ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_S * 1000),
                ("grpc.max_connection_idle_ms", _MAX_IDLE_S * 1000),
            ],
        )
        server.add_generic_rpc_handlers(self._service.handlers())
        try:
            self.port = server.add_insecure_port(str(self._address))
        except RuntimeError:
            raise PortInUseError(
                f"gRPC cannot listen on {self._address}: the port is in use, or the address is "
                "not this machine's",
                hint="choose another with HELIOSTAT_GRPC_PORT=PORT or HELIOSTAT_HOST=ADDRESS",
            ) from None
        await server.start()
        self._server = server
        logger.info("gRPC listens on %s", GrpcAddress(self._address.host, self.port))

    async def stop(self) -> None:
        """Take no more calls, and let those under way end."""
        if self._server is not None:
            await self._server.stop(_PATIENCE_S)
            self._server = None
