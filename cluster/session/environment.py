"""The variables that the stack's processes run with, and those that a user's shell needs.

Ray and Serve read theirs when they are imported, so they are set before the head starts and every
worker, job and replica inherits them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.session.ports import replica_port_max
from cluster.session.scratch import scratch_dir
from cluster.settings import Settings, environment_for_children

# A shell that evaluated `heliostat env` carries client settings that would mislead a server.
_CLIENT_ONLY = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_JOB_HEADERS",
    "MLFLOW_TRACKING_TOKEN",
    "OPENAI_BASE_URL",
    "OPENAI_API_KEY",
)


def stack_environment(settings: Settings) -> dict[str, str]:
    """Everything a server process of the stack runs with."""
    inherited = environment_for_children(settings)
    for name in _CLIENT_ONLY:
        inherited.pop(name, None)
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}"
    return {
        **inherited,
        "PATH": search_path,  # jobs find this Python, and torch finds ninja
        "PYTHONPATH": str(settings.source_dir),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch_dir(settings.home) / "tmp"),
        # A machine may share what it compiled between stacks.
        "TORCH_EXTENSIONS_DIR": inherited.get(
            "TORCH_EXTENSIONS_DIR", str(settings.home / "cache" / "torch_extensions")
        ),
        **_library_variables(settings),
        **ray_variables(settings),
        **_serve_variables(settings),
    }


def ray_variables(settings: Settings) -> dict[str, str]:
    """What the head, its workers and any client on this machine must agree on."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.ray_token_path),
        # Outside of a cluster Ray takes 127.0.0.1 for the node's own address, and then everything
        # it opens is on loopback; inside one it resolves loopback to the network's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_START_HOOK": "cluster.session.ray_start_hook.close_doors",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # The raylet gives up on a machine that is too busy to start its agent in Ray's 30 s.
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # A job that is stopped has so long to save a checkpoint; Ray's 3 s are too few.
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "RAY_TMPDIR": str(scratch_dir(settings.home)),
        "DASHBOARD_METRIC_PORT": str(settings.dashboard_metrics_port),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }


def _library_variables(settings: Settings) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "DS_BUILD_OPS": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _serve_variables(settings: Settings) -> dict[str, str]:
    haproxy = scratch_dir(settings.home) / "h"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": str(settings.max_connections),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy_wrapper_path(settings)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        # Ray appends the node id (56 digits) and HAProxy a process id: hence one letter.
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(settings.haproxy_stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(settings.haproxy_metrics_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(settings.proxy_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(settings.replica_port_min),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_port_max(settings)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # A killed HAProxy is noticed in 2 s, not in 30.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        # One that starts on a busy machine is not killed for taking longer than three times 5 s.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    }


def haproxy_wrapper_path(settings: Settings) -> Path:
    """The executable that Serve starts in HAProxy's place."""
    return settings.home / "haproxy"


def client_environment(settings: Settings) -> dict[str, str]:
    """What a user's shell needs for `ray job`, MLflow, the `openai` client and `heliostat`."""
    key = settings.api_key_path.read_text(encoding="ascii").strip()
    return {
        "HELIOSTAT_HOME": str(settings.home),
        "HELIOSTAT_URL": settings.gateway_url,
        "HELIOSTAT_API_KEY": key,
        "OPENAI_BASE_URL": f"{settings.gateway_url}/v1",
        "OPENAI_API_KEY": key,
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "RAY_ADDRESS": settings.dashboard_url,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": settings.ray_token_path.read_text(encoding="ascii").strip(),
        # With it `ray status --address 127.0.0.1:PORT` finds a head that is on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
