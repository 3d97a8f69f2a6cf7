"""Processes that belong to a stack: start them, recognise them later, end only them.

A started process carries the stack's home directory and its part's name in its environment, and
all its descendants inherit both. `heliostat env` never prints these variables, so a user's shell is
not mistaken for a part. Ray's agents overwrite their own environment with a process title; they are
found as descendants, and where they have outlived their parents, by the log that they write.

    record = start(["sleep", "60"], stack=home, part="mlflow", environment={}, log_path=log)
    is_alive(record)                 # True
    end(find(home))                  # and their descendants
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from cluster.config import StrictModel
from cluster.session.scratch import scratch_dir

STACK_VARIABLE = "HELIOSTAT_STACK"
PART_VARIABLE = "HELIOSTAT_PART"
RAY = "ray"
_AGENT_PREFIX = "ray::"

# psutil derives the start time from the boot time, which may shift by a clock correction.
_START_TIME_TOLERANCE_S = 2.0
_POLL_INTERVAL_S = 0.02


class ProcessRecord(StrictModel):
    """Names one process for ever: process ids are reused, start times are not."""

    pid: int
    created_at_s: float
    log_path: Path


def start(
    command: Sequence[str],
    *,
    stack: Path,
    part: str,
    environment: Mapping[str, str],
    log_path: Path,
) -> ProcessRecord:
    """Start `command` in its own session, so that Ctrl-C in the terminal does not reach it."""
    marked = {**environment, STACK_VARIABLE: str(stack), PART_VARIABLE: part}
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            command,
            env=marked,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=stack,
            start_new_session=True,
        )
    child.returncode = 0  # it outlives this process, nobody will wait for it
    created_at_s = psutil.Process(child.pid).create_time()
    return ProcessRecord(pid=child.pid, created_at_s=created_at_s, log_path=log_path)


def is_alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs."""
    try:
        process = psutil.Process(record.pid)
        difference_s = abs(process.create_time() - record.created_at_s)
    except psutil.Error:
        return False
    return difference_s < _START_TIME_TOLERANCE_S and _lives(process)


def find(stack: Path, part: str | None = None) -> list[psutil.Process]:
    """Every process of the stack (or of one part), children included, this one's family not."""
    marked = [process for process in psutil.process_iter() if _is_marked(process, stack, part)]
    family = {*marked}
    for process in marked:
        family.update(_children(process))
    others = (process for process in family - _own_line() if _lives(process))
    return sorted(others, key=lambda process: process.pid)


def end(processes: Iterable[psutil.Process], heads: Iterable[psutil.Process] = ()) -> None:
    """Ask `heads` to end their families in good order, then ask all, then kill what is left."""
    everyone = list(processes)
    waits_s = (
        (list(heads), "terminate", 5.0),
        (everyone, "terminate", 1.0),
        (everyone, "kill", 5.0),
    )
    for members, verb, timeout_s in waits_s:
        alive = [process for process in members if _lives(process)]
        for process in alive:
            _signal(process, verb)
        _wait_until_gone(alive, timeout_s)


def end_stack(stack: Path, part: str | None = None, heads: Iterable[ProcessRecord] = ()) -> int:
    """End every process of the stack (or of one part); return how many there were.

    New workers may be born while their parents die, so it looks again until nobody is left.
    """
    known_heads = [psutil.Process(head.pid) for head in heads if is_alive(head)]
    ended: set[psutil.Process] = set()
    deadline_s = time.monotonic() + 20
    while (members := find(stack, part)) and time.monotonic() < deadline_s:
        end(members, known_heads)
        ended.update(members)
    return len(ended)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; one that ended and waits for its parent to notice does not.

    The first thread of a killed process may be gone before the others, which still hold its ports.
    """
    try:
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.Error:
        return False


def _wait_until_gone(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(_lives(process) for process in processes) and time.monotonic() < deadline_s:
        time.sleep(_POLL_INTERVAL_S)


def _is_marked(process: psutil.Process, stack: Path, part: str | None) -> bool:
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    if STACK_VARIABLE not in environment:
        return part in (None, RAY) and _is_agent(process, stack)
    if environment[STACK_VARIABLE] != str(stack):
        return False
    return part is None or environment.get(PART_VARIABLE) == part


def _is_agent(process: psutil.Process, stack: Path) -> bool:
    """Whether one of Ray's agents of this stack is it. Without its raylet it holds its ports for a
    minute, while it tries to tell a head that is gone."""
    try:
        if not process.name().startswith(_AGENT_PREFIX):
            return False
        scratch = scratch_dir(stack)
        return any(Path(file.path).is_relative_to(scratch) for file in process.open_files())
    except (psutil.Error, OSError):
        return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _own_line() -> set[psutil.Process]:
    """This process and its ancestors: `heliostat down` may run inside a job of the stack."""
    own = psutil.Process()
    return {own, *own.parents()}


def _signal(process: psutil.Process, verb: str) -> None:
    try:
        getattr(process, verb)()
    except psutil.Error:
        return
