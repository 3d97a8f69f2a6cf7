"""A program that runs beside the tests, and that never outlives them.

It leads a process group of its own and holds one end of a pipe: when the other end closes, because
the tests ended or were killed, the whole group is killed. Knows nothing of what the program does.

    program = BackgroundProgram(Path("dev_life.py"), "/tmp/dev", log=Path("/tmp/dev/log"))
    program.wait(deadline_s=600)
    program.end()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_NICENESS = 10  # the tests in front come first


class BackgroundProgram:
    """A Python file, started at once; what it prints goes into `log`."""

    def __init__(self, file: Path, *arguments: str, log: Path) -> None:
        self._name = file.name
        self._log = log
        self._started_at = time.monotonic()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, str(file), *arguments],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, deadline_s: float) -> None:
        """Return once it has succeeded; `deadline_s` counts from its start.

        Raises:
            AssertionError: it failed, or still runs; with all that it has printed.
        """
        remaining_s = max(1.0, self._started_at + deadline_s - time.monotonic())
        try:
            status = self._process.wait(remaining_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self._name} still runs after {deadline_s:g} s:\n{self._printed()}"
            ) from None
        assert status == 0, f"{self._name} ended with {status}:\n{self._printed()}"

    def end(self) -> None:
        """Kill whatever is left of it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _printed(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


def end_with_the_tests() -> None:
    """What such a program calls first, before it starts anything."""
    assert os.getpgrp() == os.getpid(), "started by something else than BackgroundProgram"
    os.nice(_NICENESS)
    threading.Thread(target=_end_with_the_tests, daemon=True).start()


def _end_with_the_tests() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
