"""`heliostat up`: bring the stack to where every endpoint answers, from whatever state it is in.

A part that runs is left alone, a part that died is started again, and what a crash left behind is
ended first. If a part does not start, what this call started is ended again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from cluster.errors import ConflictError, StartError
from cluster.session import ray_head, serving
from cluster.session.environment import stack_environment
from cluster.session.first_start import (
    forget_unfinished_builds,
    prepare_home,
    prepare_keys,
)
from cluster.session.last_words import last_words
from cluster.session.parts import RAY, SERVING, ServerPart, server_parts
from cluster.session.ports import check_ports_are_free, check_ports_differ
from cluster.session.processes import ProcessRecord, end_stack, is_alive, start
from cluster.session.record import locked, read_record, write_record
from cluster.session.scratch import prepare_scratch, scratch_dir
from cluster.settings import Settings, changed_settings, store_settings

SERVING_TIMEOUT_S = 180.0
PORT_PATIENCE_S = 10.0
_POLL_INTERVAL_S = 0.1

Say = Callable[[str], None]


def up(settings: Settings, say: Say) -> None:
    """Start what does not run and return when everything answers.

    Raises:
        PortInUseError: somebody else has a port; nothing was started.
        StartError: a part did not start; what was started for it is ended.
    """
    check_ports_differ(settings)
    prepare_home(settings.home)
    with locked(settings.home, say):
        _Start(settings, say).run()


class _Start:
    """One run of `up`: the settings, where it tells, and what it has started so far."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self._settings = settings
        self._say = say
        self._record = read_record(settings.home)
        self._started: list[ServerPart] = []
        self._gave_up = False
        self._begun_s = time.monotonic()

    def run(self) -> None:
        self._check_settings_are_those_that_run()
        missing = self._missing_servers()
        names = [part.name for part in missing]
        died = [name for name in names if name in self._record.parts]
        serves = RAY not in names and self._serves()
        if serves and not missing:
            self._say("  everything runs already")
        self._end_leftovers(missing)
        check_ports_are_free(
            self._settings,
            [*names, SERVING] if RAY in names else names,
            patience_s=PORT_PATIENCE_S if died else 0.0,
        )
        store_settings(self._settings)
        self._prepare(starts_ray=RAY in names)
        try:
            self._start_all(missing, serves=serves)
        except BaseException:
            self._end_what_was_started()
            raise

    def _check_settings_are_those_that_run(self) -> None:
        runs = any(is_alive(process) for process in self._record.parts.values())
        changed = changed_settings(self._settings)
        if runs and changed:
            raise ConflictError(
                f"the cluster runs with other settings than asked for: {', '.join(changed)}",
                hint="run `heliostat down` first",
            )

    def _missing_servers(self) -> list[ServerPart]:
        """Parts whose process is gone, or lives but no longer answers."""
        missing = []
        for part in server_parts(self._settings):
            process = self._record.parts.get(part.name)
            if process is None or not is_alive(process) or not self._answers(part):
                missing.append(part)
        return missing

    def _answers(self, part: ServerPart) -> bool:
        deadline_s = time.monotonic() + 5
        while not (ready := part.is_ready(self._settings)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_INTERVAL_S)
        return ready

    def _serves(self) -> bool:
        try:
            return serving.is_ready(self._settings)
        except StartError:
            return False

    def _end_leftovers(self, missing: Sequence[ServerPart]) -> None:
        for part in missing:
            count = end_stack(self._settings.home, part.name)
            if count:
                self._say(f"ended {count} processes that a crash of the {part.label} left")
            self._record = self._record.without_part(part.name)

    def _prepare(self, *, starts_ray: bool) -> None:
        scratch = scratch_dir(self._settings.home)
        if starts_ray:
            prepare_scratch(scratch)
            forget_unfinished_builds(self._settings.home)
        self._record = self._record.model_copy(update={"scratch_dir": scratch})
        write_record(self._settings.home, self._record)
        ray_head.ensure_token(self._settings)

    def _start_all(self, parts: Sequence[ServerPart], *, serves: bool) -> None:
        """Start all servers at once, make the keys while they boot, then deploy the gateway."""
        environment = stack_environment(self._settings)
        self._begun_s = time.monotonic()
        for part in parts:
            self._start(part, environment)
        with ThreadPoolExecutor(len(parts) + 2) as pool:
            servers = {part.name: pool.submit(self._wait, part) for part in parts}
            keys = pool.submit(prepare_keys, self._settings)
            labels = {servers[part.name]: part.label for part in parts}
            if parts:
                labels[keys] = "database and keys"
            if not serves:
                needed = [keys, *(servers[name] for name in servers if name == RAY)]
                labels[pool.submit(self._start_serving, needed)] = "gateway"
            try:
                for done in as_completed({keys, *labels}):
                    done.result()
                    if done in labels:
                        self._tell(labels[done])
            finally:
                self._gave_up = True  # lets the other waiting threads end

    def _start(self, part: ServerPart, environment: dict[str, str]) -> None:
        process = start(
            part.command(self._settings),
            stack=self._settings.home,
            part=part.name,
            environment={**environment, **part.environment},
            log_path=self._settings.log_dir / f"{part.name}.log",
        )
        self._started.append(part)
        self._record = self._record.with_part(part.name, process)
        write_record(self._settings.home, self._record)

    def _wait(self, part: ServerPart) -> None:
        process = self._record.parts[part.name]
        deadline_s = time.monotonic() + part.timeout_s
        while not part.is_ready(self._settings) and not self._gave_up:
            if not is_alive(process):
                raise _start_error(part.label, "ended", process)
            if time.monotonic() > deadline_s:
                raise _start_error(
                    part.label, f"is not ready after {part.timeout_s:.0f} s", process
                )
            time.sleep(_POLL_INTERVAL_S)

    def _start_serving(self, needed: Sequence[Future[None]]) -> None:
        for part in needed:
            part.result()
        try:
            serving.deploy(self._settings)
        except StartError:
            # Its dashboard answers before `ray start` is through, and goes with it.
            head = self._record.parts.get(RAY)
            if head is not None and not is_alive(head):
                raise _start_error("Ray head", "ended", head) from None
            raise
        deadline_s = time.monotonic() + SERVING_TIMEOUT_S
        log_dir = scratch_dir(self._settings.home) / "ray" / "session_latest" / "logs" / "serve"
        hint = f"logs are in {log_dir}"
        while not self._gave_up:
            try:
                if serving.is_ready(self._settings):
                    break
            except StartError as error:
                raise StartError(error.message, hint=hint) from None
            if time.monotonic() > deadline_s:
                raise StartError(f"gateway is not ready after {SERVING_TIMEOUT_S:.0f} s", hint=hint)
            time.sleep(_POLL_INTERVAL_S)

    def _tell(self, label: str) -> None:
        self._say(f"  {label:<18} ready after {time.monotonic() - self._begun_s:5.1f} s")

    def _end_what_was_started(self) -> None:
        if self._started:
            self._say("  ending what was started")
        for part in self._started:
            process = self._record.parts[part.name]
            end_stack(self._settings.home, part.name, [process])
            self._record = self._record.without_part(part.name)
        write_record(self._settings.home, self._record)


def _start_error(label: str, what: str, process: ProcessRecord) -> StartError:
    said = last_words(process.log_path)
    return StartError(
        f"{label} {what}" + (f": {said}" if said else ""), hint=f"its log is {process.log_path}"
    )
