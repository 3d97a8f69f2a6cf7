"""Submitting jobs to a running Ray cluster, and following them.

A job is a verb, one file in `jobs/`; it runs as `python -m jobs.VERB` in a copy of the checkout.
Knows nothing of what the verbs do: it lists them, it never imports them.

    jobs = Jobs.connect(load_settings())
    job_id = jobs.submit("train", Path("configs/train/digits.yaml"), ["training.steps=10"])
    for text in jobs.follow(job_id):
        print(text, end="")
    jobs.require_success(job_id)
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ConfigError, JobFailedError, NotFoundError, NotRunningError, UsageError
from cluster.settings import Settings

# What .gitignore does not name but no job needs. Ray leaves out what .gitignore names, and .git.
EXCLUDES = ["/docs/", "/tests/", "/infra/", "/benchmarks/"]
_CONFIG_VARIABLE = "HELIOSTAT_JOB_CONFIG"
_MAX_CONFIG_BYTES = 100_000
_POLL_INTERVAL_S = 0.3
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

JobState = Literal["running", "succeeded", "failed", "unknown"]
_STATES: dict[str, JobState] = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "failed"}


@dataclass(frozen=True)
class JobInfo:
    """A submitted job; times are ISO 8601 in UTC."""

    id: str
    verb: str
    status: str
    message: str
    started_at: str | None
    ended_at: str | None


def known_jobs(source_dir: Path) -> list[str]:
    """The verbs: the modules that lie directly in `jobs/`."""
    return sorted(path.stem for path in (source_dir / "jobs").glob("[a-z]*.py"))


def git_commit(source_dir: Path) -> str:
    """The checkout's commit, with `-dirty` if files differ from it; empty outside of git."""
    commit = _git(source_dir, "rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _git(source_dir, "status", "--porcelain") else commit


def has_commit(source_dir: Path, commit: str) -> bool:
    """Whether the checkout knows a commit, asking no remote."""
    return bool(_git(source_dir, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"))


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, client: Any, source_dir: Path) -> None:
        self._client = client
        self._source_dir = source_dir

    @classmethod
    def connect(cls, settings: Settings) -> Jobs:
        """Raises NotRunningError if there is no cluster."""
        from ray.job_submission import JobSubmissionClient

        # They tell of every file that is left out.
        for name in ("", ".dashboard.modules.dashboard_sdk", ".dashboard.modules.job.sdk"):
            logging.getLogger(f"ray{name}").setLevel(logging.ERROR)
        try:
            token = settings.ray_token_path.read_text(encoding="ascii").strip()
            client = JobSubmissionClient(
                settings.dashboard_url, headers={"Authorization": f"Bearer {token}"}
            )
        except (FileNotFoundError, ConnectionError):
            raise NotRunningError(
                f"no Ray cluster answers at {settings.dashboard_url}", hint="run `heliostat up`"
            ) from None
        except RuntimeError as error:
            raise NotRunningError(
                f"Ray at {settings.dashboard_url} refused us: {str(error).splitlines()[0][:200]}",
                hint=f"is that the cluster of {settings.home}? see `heliostat status`",
            ) from None
        return cls(client, settings.source_dir)

    def submit(
        self,
        verb: str,
        config: Path,
        overrides: Sequence[str] = (),
        *,
        job_id: str | None = None,
    ) -> str:
        """Start `python -m jobs.VERB --config CONFIG --set …` on the cluster; return the job's id.

        Args:
            job_id: the id it is to have; None makes one of the verb and the time.

        Raises:
            UsageError: there is no such job.
            ConfigError: the config file does not exist.
            NotRunningError: the cluster does not answer, or knows a job of this id.
        """
        check_verb(verb, self._source_dir)
        check_config(config)
        entrypoint, variables = _entrypoint(verb, config, overrides, self._source_dir)
        moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        submitted: str = self._ask(
            "submit_job",
            entrypoint=entrypoint,
            submission_id=job_id or f"{verb}-{moment}-{secrets.token_hex(2)}",
            runtime_env={
                "working_dir": str(self._source_dir),
                "excludes": EXCLUDES,
                "env_vars": {"HELIOSTAT_GIT_COMMIT": git_commit(self._source_dir), **variables},
            },
            metadata={"verb": verb, "config": str(config)},
            entrypoint_num_cpus=0,
        )
        return submitted

    def submit_once(
        self, verb: str, config: Path, overrides: Sequence[str] = (), *, job_id: str
    ) -> None:
        """As `submit`, unless a job of this id has been submitted already."""
        try:
            self.submit(verb, config, overrides, job_id=job_id)
        except NotRunningError:
            # Ray refuses an id that it knows: somebody else has submitted it.
            if self.state(job_id) == "unknown":
                raise

    def state(self, job_id: str) -> JobState:
        """How far a job is; `unknown` if there is none of this id, or not any more."""
        try:
            status = self.info(job_id).status
        except NotFoundError:
            return "unknown"
        return _STATES.get(status, "running")

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job prints, as it prints it, until it ends."""
        self.info(job_id)
        num_shown = 0
        for text in self._tail(job_id):
            num_shown += len(text)
            yield text
        has_ended = False
        while not has_ended:  # the last lines, or all that follow a broken stream
            has_ended = self._has_ended(job_id)
            rest = self._ask("get_job_logs", job_id)[num_shown:]
            num_shown += len(rest)
            yield rest
            if not has_ended:
                time.sleep(_POLL_INTERVAL_S)

    def _tail(self, job_id: str) -> Iterator[str]:
        """Pieces of output; stops when the job ends, which Ray's stream notices seconds later."""
        stream = self._client.tail_job_logs(job_id)
        with asyncio.Runner() as runner:
            waiting: asyncio.Task[str | None] | None = None
            while True:
                waiting = waiting or runner.get_loop().create_task(_next(stream))
                if runner.run(_is_done(waiting)):
                    text = None if waiting.exception() else waiting.result()
                    if text is None:
                        return
                    yield text
                    waiting = None
                elif self._has_ended(job_id):
                    return

    def _has_ended(self, job_id: str) -> bool:
        return str(self._ask("get_job_status", job_id).value) in _ENDED

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        self.info(job_id)
        text: str = self._ask("get_job_logs", job_id)
        return text

    def info(self, job_id: str) -> JobInfo:
        """Raises NotFoundError if there is no such job."""
        found = {job.id: job for job in self.list()}
        if job_id not in found:
            close = difflib.get_close_matches(job_id, found, n=1)
            guess = f"did you mean '{close[0]}'? " if close else ""
            raise NotFoundError(
                f"there is no job '{job_id}'", hint=f"{guess}see `heliostat jobs list`"
            )
        return found[job_id]

    def list(self) -> Sequence[JobInfo]:
        """Every submitted job, newest first."""
        details = [job for job in self._ask("list_jobs") if job.submission_id]
        details.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [_info(job) for job in details]

    def stop(self, job_id: str) -> bool:
        """Ask the job to stop; False if it had ended already."""
        if self.info(job_id).status in _ENDED:
            return False
        return bool(self._ask("stop_job", job_id))

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call Ray's client; its errors become one line."""
        try:
            return getattr(self._client, method)(*arguments, **options)
        except (OSError, RuntimeError) as error:  # a refused connection, or a head half gone
            text = str(error).strip() or type(error).__name__
            raise NotRunningError(
                f"the Ray cluster did not answer ({method}): {text.splitlines()[-1][:200]}",
                hint="see `heliostat status`",
            ) from None

    def require_success(self, job_id: str) -> None:
        """Wait for the job's end.

        Raises:
            JobFailedError: it failed or was stopped.
        """
        while not self._has_ended(job_id):
            time.sleep(_POLL_INTERVAL_S)
        info = self.info(job_id)
        if info.status != "SUCCEEDED":
            raise JobFailedError(
                f"job {job_id} {info.status.lower()}: {info.message}",
                hint=f"its output: `heliostat jobs logs {job_id}`",
            )


def check_verb(verb: str, source_dir: Path) -> None:
    """Raises UsageError, naming the jobs there are, unless `verb` is one."""
    known = known_jobs(source_dir)
    if verb not in known:
        raise UsageError(f"there is no job '{verb}'", hint=f"jobs are: {', '.join(known)}")


def check_config(config: Path) -> None:
    """Raises ConfigError unless the file exists."""
    if not config.is_file():
        raise ConfigError(f"config file '{config}' does not exist", hint="check the path")


def _entrypoint(
    verb: str, config: Path, overrides: Sequence[str], source_dir: Path
) -> tuple[str, dict[str, str]]:
    """The job's shell command and the variables it needs.

    A config inside the checkout travels with it; one from elsewhere travels in a variable.
    """
    settings = [f"--set {shlex.quote(override)}" for override in overrides]
    path = config.resolve()
    if path.is_relative_to(source_dir):
        relative = shlex.quote(str(path.relative_to(source_dir)))
        return " ".join([f"python -m jobs.{verb} --config {relative}", *settings]), {}
    text = path.read_text(encoding="utf-8")
    if len(text.encode()) > _MAX_CONFIG_BYTES:
        raise ConfigError(
            f"config file '{config}' is larger than {_MAX_CONFIG_BYTES} bytes",
            hint="put it into the checkout, then it is sent as a file",
        )
    command = " ".join(
        [
            f"config=$(mktemp -d)/{shlex.quote(path.name)}",
            f'&& printf %s "${_CONFIG_VARIABLE}" > "$config"',
            f'&& exec python -m jobs.{verb} --config "$config"',
            *settings,
        ]
    )
    return command, {_CONFIG_VARIABLE: text}


async def _next(stream: Any) -> str | None:
    return await anext(stream, None)


async def _is_done(task: asyncio.Task[str | None]) -> bool:
    done, _ = await asyncio.wait({task}, timeout=_POLL_INTERVAL_S)
    return bool(done)


def _info(job: Any) -> JobInfo:
    return JobInfo(
        id=job.submission_id,
        verb=(job.metadata or {}).get("verb", ""),
        status=str(getattr(job.status, "value", job.status)),
        message=_reason(job),
        started_at=_time(job.start_time),
        ended_at=_time(job.end_time),
    )


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _reason(job: Any) -> str:
    """Why it ended, without the output that Ray appends to it."""
    if job.driver_exit_code:
        return f"exit code {job.driver_exit_code}"
    lines = [line.strip() for line in (job.message or "").splitlines() if line.strip()]
    return lines[0] if lines else ""


def _git(source_dir: Path, *arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", "-C", str(source_dir), *arguments],  # noqa: S607 - whichever git is installed
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
