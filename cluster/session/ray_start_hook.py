"""What `ray start` calls before it starts anything (`RAY_START_HOOK`): close doors nobody uses.

Ray Client's server cannot be switched off by an option; jobs go through the Jobs API instead.
"""

from __future__ import annotations

from typing import Any


def close_doors(parameters: Any, is_head: bool) -> None:
    parameters.ray_client_server_port = None
