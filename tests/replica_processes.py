"""The processes of a stack that tests kill, stop and watch.

replicas(stack, "talker.v1", 2)[0].kill()
"""

from __future__ import annotations

import contextlib
import re
import time

import psutil

from cluster.session.processes import find
from tests.stack import Stack


def processes(stack: Stack, pattern: str) -> list[psutil.Process]:
    """Those of the stack whose command line looks like this."""
    found = []
    for process in find(stack.settings.home):
        with contextlib.suppress(psutil.Error):
            if re.search(pattern, " ".join(process.cmdline())):
                found.append(process)
    return found


def replicas(
    stack: Stack, deployment: str, number: int, timeout_s: float = 40
) -> list[psutil.Process]:
    """The replicas of a deployment, once there are so many."""
    deadline_s = time.monotonic() + timeout_s
    while len(found := processes(stack, f"ServeReplica:{deployment}")) != number:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.1)
    return found


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
