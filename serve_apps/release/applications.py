"""What the release controller can do with Serve applications, and how Serve says they are.

`Applications` is the seam: `serve_applications.py` is the real thing, `fake_applications.py` the
rehearsal. All of it blocks: call it in a thread.

    applications.start(deployment, "graph")
    applications.statuses()["digits.v3"].phase
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import ValidationError

from cluster.errors import HeliostatError
from cluster.releases import Deployment

Phase = Literal["scheduling", "starting", "running", "failed", "deleting"]

_EXCEPTION_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception)): (.+)$")
_MAX_REASON = 500


@dataclass(frozen=True)
class ApplicationStatus:
    """One application as Serve reports it."""

    phase: Phase
    message: str = ""
    """Why it failed, in one line."""
    num_replicas: int = 0
    """Those that run now; none is no fault where it scales to zero."""


@dataclass(frozen=True)
class Node:
    """What one node has in all, whoever uses it now."""

    num_cpus: float
    num_gpus: float


class Applications(Protocol):
    """Starts, watches and deletes the applications of model versions."""

    def nodes(self) -> Sequence[Node]:
        """The nodes that replicas can be placed on."""

    def statuses(self) -> dict[str, ApplicationStatus]:
        """Every model application by name."""

    def start(self, deployment: Deployment, kind: str) -> None:
        """Ask for an application; returns before it runs.

        Only where there is none: Serve replaces every replica of one that is there.
        """

    def delete(self, application: str) -> None:
        """Ask for its end; returns before it is gone."""


def is_model_application(name: str) -> bool:
    """Whether an application serves a model version, as `NAME.vVERSION` says."""
    return re.fullmatch(r".+\.v[1-9][0-9]*", name) is not None


def describe_error(error: Exception) -> str:
    """Why an application could not be asked for, in one line."""
    if isinstance(error, HeliostatError):
        return str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    reason = one_line_reason(str(error)) if str(error).strip() else type(error).__name__
    return reason[:_MAX_REASON]


def one_line_reason(message: str) -> str:
    """The error inside Serve's report of a failed constructor, without its traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        match = _EXCEPTION_LINE.match(line)
        if match is not None and match[1] not in ("RayTaskError", "ActorDiedError"):
            return match[2] if match[2].strip() else line
    return lines[-1] if lines else "no reason was given"
