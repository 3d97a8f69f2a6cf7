"""Processes that belong to a stack: start them, recognise them later, end only them.

A started process carries the stack's home directory and its part's name in its environment, and
all its descendants inherit both. `heliostat env` never prints these variables, so a user's shell is
not mistaken for a part. Ray's agents overwrite their own environment with a process title; they are
found as descendants.

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

STACK_VARIABLE = "HELIOSTAT_STACK"
PART_VARIABLE = "HELIOSTAT_PART"

# psutil derives the start time from the boot time, which may shift by a clock correction.
_START_TIME_TOLERANCE_S = 2.0


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
    created_at_s = psutil.Process(child.pid).create_time()
    return ProcessRecord(pid=child.pid, created_at_s=created_at_s, log_path=log_path)


def is_alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs."""
    try:
        process = psutil.Process(record.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - record.created_at_s) < _START_TIME_TOLERANCE_S
    except psutil.Error:
        return False


def find(stack: Path, part: str | None = None) -> list[psutil.Process]:
    """Every process of the stack (or of one part), children included, this one's family not."""
    marked = [process for process in psutil.process_iter() if _is_marked(process, stack, part)]
    family = {*marked}
    for process in marked:
        family.update(_children(process))
    return sorted(family - _own_line(), key=lambda process: process.pid)


def end(
    processes: Iterable[psutil.Process],
    *,
    first: Iterable[psutil.Process] = (),
    grace_s: float = 5.0,
) -> list[psutil.Process]:
    """Ask `first` (or all) to end, wait, then kill what is left; return what survived even that.

    The head of a part ends its own children in good order, so it may be asked alone.
    """
    everyone = list(processes)
    for process in list(first) or everyone:
        _signal(process, "terminate")
    _, alive = psutil.wait_procs(everyone, timeout=grace_s)
    for process in alive:
        _signal(process, "kill")
    _, alive = psutil.wait_procs(alive, timeout=5.0)
    return [process for process in alive if process.is_running()]


def end_stack(stack: Path, part: str | None = None, roots: Iterable[ProcessRecord] = ()) -> int:
    """End every process of the stack (or of one part); return how many there were.

    New workers may be born while their parents die, so it looks again until nobody is left.
    """
    heads = [psutil.Process(root.pid) for root in roots if is_alive(root)]
    ended = 0
    deadline_s = time.monotonic() + 20
    while (members := find(stack, part)) and time.monotonic() < deadline_s:
        end(members, first=heads, grace_s=5.0 if heads or not ended else 0.2)
        ended += len(members)
        heads = []
    return ended


def _is_marked(process: psutil.Process, stack: Path, part: str | None) -> bool:
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    if environment.get(STACK_VARIABLE) != str(stack):
        return False
    return part is None or environment.get(PART_VARIABLE) == part


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
