"""Trainings on the local stack that tests interfere with.

run = FaultyRun.start(stack, config_file, log_file, "run_name=killed")
run.wait_for_step(30)
run.workers()[0].send_signal(signal.SIGKILL)
assert run.wait() == 0
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.config import load_config
from jobs.training.config import TrainConfig
from jobs.training.run_directory import RunDirectory
from jobs.training.step_log import STEP_LOG_FILE, StepRecord, read_steps
from tests.stack import ROOT, Stack

_WORKER = "ray::RayTrainWorker"


@dataclass(frozen=True)
class FaultyRun:
    """A driver process, and what it has printed so far."""

    stack: Stack
    config: TrainConfig
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls,
        stack: Stack,
        config_file: Path,
        log: Path,
        *overrides: str,
        command: Sequence[str | Path] = (sys.executable, "-m", "jobs.train"),
    ) -> FaultyRun:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--config", config_file] + (["--set", *overrides] if overrides else []),
                env=stack.environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return cls(stack, load_config(config_file, TrainConfig, list(overrides)), process, log)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def steps(self) -> list[StepRecord]:
        """What it has committed, once it has ended."""
        run = RunDirectory.of(self.config, self.stack.settings.home)
        return list(read_steps(run.path / STEP_LOG_FILE))

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        """Until it has told of this step or a later one."""
        self.wait_for(lambda: self.last_step >= step, f"step {step}", timeout_s)

    def wait_for_text(self, text: str, timeout_s: float = 120) -> None:
        self.wait_for(lambda: text in self.output, repr(text), timeout_s)

    @property
    def last_step(self) -> int:
        """That it has told of last; what is done again after a fault counts anew."""
        found = re.findall(r"^step +(\d+)/", self.output, re.MULTILINE)
        return int(found[-1]) if found else 0

    def workers(self) -> list[psutil.Process]:
        """The processes that Ray Train has placed on this stack."""
        return [process for process in psutil.process_iter() if self._is_worker(process)]

    def _is_worker(self, process: psutil.Process) -> bool:
        try:
            token = process.environ().get("RAY_AUTH_TOKEN_PATH")
            is_ours = token == str(self.stack.settings.ray_token_path)
            return is_ours and process.cmdline()[0].startswith(_WORKER)
        except (psutil.Error, IndexError):
            return False

    def wait(self, timeout_s: float = 150) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.output[-3000:]}") from None

    def wait_for(self, is_true: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"no {what} (exit {ended}):\n{self.output[-3000:]}")
            time.sleep(0.02)
