"""`heliostat down`: end what `up` started, with all its descendants, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.errors import HeliostatError
from cluster.session import serving
from cluster.session.processes import end_stack, find
from cluster.session.record import delete_record, locked, read_record
from cluster.session.scratch import remove_temporary_files, scratch_dir
from cluster.settings import Settings

DRAIN_S = 30.0


def down(settings: Settings, say: Callable[[str], None]) -> None:
    """End the stack, after requests under way were answered; doing it twice is no error.

    Raises:
        HeliostatError: a process could not be ended.
    """
    if not settings.home.is_dir():
        say(f"nothing runs: {settings.home} does not exist")
        return
    with locked(settings.home, say):
        begun_s = time.monotonic()
        record = read_record(settings.home)
        serving.drain(settings, DRAIN_S)
        count = end_stack(settings.home, heads=record.parts.values())
        left = find(settings.home)
        if left:
            raise HeliostatError(
                f"{len(left)} processes did not end, among them {left[0].name()} "
                f"(pid {left[0].pid})",
                hint="end them by hand and run `heliostat down` again",
            )
        delete_record(settings.home)
        remove_temporary_files(record.scratch_dir or scratch_dir(settings.home))
    say(
        f"ended {count} processes in {time.monotonic() - begun_s:.1f} s" if count else "nothing ran"
    )
