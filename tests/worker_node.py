"""A second node of a stack, on the same machine: another raylet, with workers of its own.

with WorkerNode(stack, num_cpus=1) as node:
    node.kill()
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from types import TracebackType
from typing import Self

import psutil

from cluster.session.environment import stack_environment
from cluster.session.processes import find, is_alive, start
from cluster.settings import LOOPBACK
from tests.stack import Stack

JOINED = "joined the cluster"
_NUMBERS = itertools.count()
_JOIN_S = 60.0


class WorkerNode:
    """It joins at the beginning and is gone at the end; `heliostat down` would end it too."""

    def __init__(self, stack: Stack, num_cpus: int) -> None:
        self._stack = stack
        self._num_cpus = num_cpus
        self._part = f"worker-{next(_NUMBERS)}"

    def __enter__(self) -> Self:
        settings = self._stack.settings
        address = f"{LOOPBACK}:{settings.ray_port}"
        joined = start(
            [sys.executable, "-m", "tests.worker_raylet", address, str(self._num_cpus)],
            stack=settings.home,
            part=self._part,
            environment=stack_environment(settings),
            log_path=settings.log_dir / f"{self._part}.log",
        )
        deadline_s = time.monotonic() + _JOIN_S
        while JOINED not in (said := joined.log_path.read_text(encoding="utf-8")):
            assert is_alive(joined), said
            assert time.monotonic() < deadline_s, said
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Those of a deployment that run here."""
        found = []
        for process in find(self._stack.settings.home, self._part):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{deployment}" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """All of it at once, as when a machine loses its power."""
        home = self._stack.settings.home
        while members := find(home, self._part):
            for process in members:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(members, timeout=5)
