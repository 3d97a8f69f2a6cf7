"""Every decision of the release policy, as a table."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cluster.releases import Deployment, State
from serve_apps.release.applications import ApplicationStatus, Phase, one_line_reason
from serve_apps.release.policy import Observation, ReleasePolicy

CREATED = datetime(2026, 1, 1, tzinfo=UTC)


def row(state: State) -> Deployment:
    at = CREATED.isoformat()
    return Deployment("m", 2, "sha256:0", "m.v2", state, "", {}, at, at)


def application(phase: Phase | None, *, age_s: float = -1) -> ApplicationStatus | None:
    """An application asked for `age_s` before the deployment; by default just after it."""
    if phase is None:
        return None
    return ApplicationStatus(phase, "it broke", CREATED.timestamp() - age_s)


@pytest.mark.parametrize(
    ("state", "phase", "seconds", "action", "next_state"),
    [
        ("deploying", None, 0, "start", None),
        ("deploying", "scheduling", 1, "wait", None),
        ("deploying", "starting", 1, "enter", "warming"),
        ("deploying", "running", 1, "enter", "parity"),
        ("deploying", "failed", 1, "fail", None),
        ("deploying", "deleting", 1, "wait", None),
        ("warming", "starting", 1, "wait", None),
        ("warming", "running", 1, "enter", "parity"),
        ("warming", "failed", 1, "fail", None),
        ("warming", "starting", 1000, "fail", None),
        ("warming", None, 1, "start", None),
        ("parity", "running", 0, "check", None),
        ("parity", "failed", 0, "fail", None),
        ("parity", None, 0, "start", None),
        ("champion", "running", 99, "wait", None),
        ("champion", "starting", 9999, "wait", None),
        ("champion", None, 99, "start", None),
        ("champion", "failed", 99, "fail", None),
        ("standby", "running", 99, "wait", None),
        ("standby", None, 99, "start", None),
        ("failed", "failed", 0, "delete", None),
        ("failed", "deleting", 0, "wait", None),
        ("failed", None, 0, "wait", None),
        ("retiring", "running", 1.0, "wait", None),
        ("retiring", "running", 2.5, "delete", None),
        ("retiring", "deleting", 9, "wait", None),
        ("retiring", None, 0, "forget", None),
    ],
)
def test_decisions(
    state: State, phase: Phase | None, seconds: float, action: str, next_state: State | None
) -> None:
    decision = ReleasePolicy().decide(Observation(row(state), application(phase), seconds))
    assert (decision.action, decision.state) == (action, next_state)


def test_an_application_left_from_an_earlier_try_is_asked_for_anew() -> None:
    for phase in ("failed", "running"):
        left = application(phase, age_s=60)
        decision = ReleasePolicy().decide(Observation(row("deploying"), left, 0))
        assert decision.action == "start"


def test_a_failure_keeps_the_replicas_own_reason() -> None:
    decision = ReleasePolicy().decide(Observation(row("warming"), application("failed"), 0))
    assert decision.reason == "it broke"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "The deployment failed to start 1 times in a row. Error:\n"
            "\x1b[36mray::ServeReplica:m.v2:predictor.initialize()\x1b[39m (pid=1)\n"
            '  File "/x/deployment.py", line 3, in __init__\n'
            "    golden.check_graph(package.manifest, self._runtime.run)\n"
            "cluster.errors.ParityError: 'logits' differs by 1, expected 0.1; do not serve it",
            "'logits' differs by 1, expected 0.1; do not serve it",
        ),
        ("ValueError: bad\n\nDuring handling\nRuntimeError: worse\n", "worse"),
        ("no exception here\n", "no exception here"),
        ("", "no reason was given"),
    ],
)
def test_a_reason_is_one_line_without_traceback(message: str, reason: str) -> None:
    assert one_line_reason(message) == reason
