"""Who runs a batch's job: Ray, through its job client, or a child process of one's own.

runner = RayRunner(settings)
runner.start("batch_4f1c-0", {"model": "assistant/3", "input": "storage://…", …})
runner.state("batch_4f1c-0")        # running, succeeded, failed or unknown
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from cluster.errors import NotFoundError
from cluster.settings import Settings, environment_for_children
from cluster.submission import Jobs, JobState

_VERB = "predict"


class JobRunner(Protocol):
    """Runs `jobs.predict`. All may raise NotRunningError; then it is tried again later."""

    def start(self, job_id: str, config: Mapping[str, Any]) -> None:
        """Run it, unless a job of this id has been started already."""

    def state(self, job_id: str) -> JobState:
        """`unknown`: no such job, or it was forgotten with the cluster that ran it."""

    def stop(self, job_id: str) -> None:
        """Ask it to stop; one that has ended or is unknown is no error."""


class RayRunner:
    """Jobs on the cluster of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self, job_id: str, config: Mapping[str, Any]) -> None:
        jobs = Jobs.connect(self._settings)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{job_id}.yaml"
            path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
            jobs.submit_once(_VERB, path, job_id=job_id)

    def state(self, job_id: str) -> JobState:
        return Jobs.connect(self._settings).state(job_id)

    def stop(self, job_id: str) -> None:
        with contextlib.suppress(NotFoundError):
            Jobs.connect(self._settings).stop(job_id)


class ProcessRunner:
    """Jobs as children of this process, for tests and rehearsals without Ray.

    Args:
        environment: what the children need beside the settings.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        self._settings = settings
        self._environment = dict(environment or {})
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, job_id: str, config: Mapping[str, Any]) -> None:
        with self._lock:
            if job_id in self._children:
                return
            directory = self._settings.home / "batch_jobs"
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{job_id}.yaml"
            path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
            with (directory / f"{job_id}.log").open("ab") as log:
                self._children[job_id] = subprocess.Popen(
                    [sys.executable, "-m", f"jobs.{_VERB}", "--config", str(path)],
                    cwd=self._settings.source_dir,
                    env={**environment_for_children(self._settings), **self._environment},
                    stdout=log,
                    stderr=log,
                )

    def state(self, job_id: str) -> JobState:
        child = self._children.get(job_id)
        if child is None:
            return "unknown"
        code = child.poll()
        if code is None:
            return "running"
        return "succeeded" if code == 0 else "failed"

    def stop(self, job_id: str) -> None:
        child = self._children.get(job_id)
        if child is not None and child.poll() is None:
            child.terminate()

    def close(self) -> None:
        """End all children."""
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.wait()
