"""The ports a stack needs, and the one-line answer when somebody else has one.

check_ports_are_free(settings, ["mlflow"])       # raises PortInUseError
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

import psutil

from cluster.errors import ConfigError, PortInUseError
from cluster.settings import LOOPBACK, Settings

# Part → the settings that hold its ports. Replicas' ports come from a range of their own.
PORTS: dict[str, tuple[str, ...]] = {
    "ray": ("ray_port", "dashboard_port", "dashboard_metrics_port", "metrics_port"),
    "mlflow": ("mlflow_port",),
    "serving": (
        "gateway_port",
        "grpc_port",
        "proxy_port",
        "haproxy_stats_port",
        "haproxy_metrics_port",
    ),
}
_POLL_INTERVAL_S = 0.05
_PUBLIC = ("gateway_port", "grpc_port", "dashboard_port")


def check_ports_differ(settings: Settings) -> None:
    """Raises ConfigError if two settings name the same port, or one of the replicas' range."""
    first, last = settings.replica_port_min, replica_port_max(settings)
    taken: dict[int, str] = {}
    for name in (name for names in PORTS.values() for name in names):
        port = getattr(settings, name)
        if port in taken:
            raise ConfigError(
                f"settings '{taken[port]}' and '{name}' both name port {port}",
                hint=f"give one of them another, e.g. HELIOSTAT_{name.upper()}={port + 1}",
            )
        if first <= port <= last:
            raise ConfigError(
                f"setting '{name}' is {port}, inside the replicas' ports {first}-{last}",
                hint="move it, or HELIOSTAT_REPLICA_PORT_MIN",
            )
        taken[port] = name


def replica_port_max(settings: Settings) -> int:
    return min(settings.replica_port_min + settings.replica_port_count - 1, 65535)


def check_ports_are_free(settings: Settings, parts: Iterable[str], patience_s: float = 0.0) -> None:
    """Raises PortInUseError naming the port, who has it if known, and the setting that moves it.

    `patience_s` is for ports whose holder is about to be gone: a process that dies closes its
    sockets after it has left the list of processes.
    """
    deadline_s = time.monotonic() + patience_s
    for part in parts:
        for name in PORTS[part]:
            port = getattr(settings, name)
            host = settings.host if name in _PUBLIC else LOOPBACK
            while not is_free(port, host):
                if time.monotonic() < deadline_s:
                    time.sleep(_POLL_INTERVAL_S)
                    continue
                raise PortInUseError(
                    f"port {port} ({name}) is in use{_holder(port)}",
                    hint=f"end that, or choose another with HELIOSTAT_{name.upper()}=PORT",
                )


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether nobody listens there; connections that linger from an earlier server do not count."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            listeners = _listeners()
            return listeners is not None and port not in listeners
    return True


def _holder(port: int) -> str:
    pid = (_listeners() or {}).get(port)
    try:
        return f" by {psutil.Process(pid).name()} (pid {pid})" if pid else ""
    except psutil.Error:
        return ""


def _listeners() -> dict[int, int | None] | None:
    """Port → process id, where the system tells; None if it tells nothing to this user."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return None
    return {
        address.port: connection.pid
        for connection in connections
        if connection.status == psutil.CONN_LISTEN and (address := connection.laddr)
    }
