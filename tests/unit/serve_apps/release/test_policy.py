"""Every decision of the release policy, as a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, Field

from cluster.errors import NotFoundError
from cluster.releases import Deployment, State
from serve_apps.release.applications import (
    ApplicationStatus,
    Phase,
    describe_error,
    one_line_reason,
)
from serve_apps.release.decisions import Decision, Observation, StartTries
from serve_apps.release.policy import ReleasePolicy

AT = "2026-01-01T00:00:00.000+00:00"


def row(state: State, *, is_started: bool = True) -> Deployment:
    started_at = AT if is_started else None
    found = Deployment("m", 2, "sha256:0", "m.v2", state, "", {}, AT, AT, 0, started_at)
    return replace(found, strategy="shadow", step=1)


def application(phase: Phase | None) -> ApplicationStatus | None:
    return None if phase is None else ApplicationStatus(phase, "it broke")


def decide(state: State, phase: Phase | None, *, is_started: bool = True, **seen: Any) -> Decision:
    found = Observation(row(state, is_started=is_started), application(phase), 0.0)
    return ReleasePolicy().decide(replace(found, **seen))


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
        ("parity", "running", 901, "fail", None),
        ("parity", "failed", 0, "fail", None),
        ("parity", None, 0, "start", None),
        ("champion", "running", 99, "wait", None),
        ("champion", "starting", 9999, "wait", None),
        ("champion", None, 99, "start", None),
        ("champion", "failed", 99, "start_again", None),
        ("standby", "running", 99, "wait", None),
        ("standby", None, 99, "start", None),
        ("shadow", None, 0, "start", None),
        ("shadow", "failed", 0, "fail", None),
        ("shadow", "running", 0, "wait", None),
        ("canary", "starting", 9999, "wait", None),
        ("canary", "running", 9999, "wait", None),
        ("rolled_back", "running", 1.0, "wait", None),
        ("rolled_back", "running", 2.5, "delete", None),
        ("rolled_back", None, 0, "wait", None),
        ("retired", None, 0, "wait", None),
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
    decision = decide(state, phase, seconds_in_state=seconds, seconds_since_start=seconds)
    assert (decision.action, decision.state) == (action, next_state)


@pytest.mark.parametrize("phase", ["failed", "running", "starting"])
def test_an_application_left_from_an_earlier_try_is_ended_before_a_new_one(phase: Phase) -> None:
    def left(found: Phase | None, seconds: float) -> str:
        return decide("deploying", found, is_started=False, seconds_in_state=seconds).action

    assert left(phase, 1.0) == "wait"  # gateways may still send requests there
    assert left(phase, 2.5) == "delete"
    assert left("deleting", 2.5) == "wait"
    assert left(None, 2.5) == "start"
    assert left("deleting", 901) == "fail"


def test_a_failure_keeps_the_replicas_own_reason() -> None:
    assert decide("warming", "failed").reason == "it broke"


def test_replicas_that_never_come_up_are_given_up_counted_from_the_start() -> None:
    decision = decide("deploying", "scheduling", seconds_in_state=1, seconds_since_start=901)
    assert (decision.action, decision.reason) == ("fail", "it did not start within 900 s")


@pytest.mark.parametrize(
    ("state", "tries", "action"),
    [
        ("deploying", StartTries(1, "lost", True, 0.1), "wait"),
        ("deploying", StartTries(1, "lost", True, 0.6), "start"),
        ("deploying", StartTries(3, "lost", True, 1.9), "wait"),
        ("deploying", StartTries(6, "lost", True, 0.0), "fail"),
        ("deploying", StartTries(1, "refused", False, 0.0), "fail"),
        ("champion", StartTries(6, "lost", True, 5.0), "wait"),
        ("champion", StartTries(10**6, "lost", True, 31.0), "start"),
        ("champion", StartTries(1, "refused", False, 0.0), "fail"),
    ],
)
def test_what_cannot_be_asked_for_is_tried_again_within_bounds(
    state: State, tries: StartTries, action: str
) -> None:
    decision = decide(state, None, tries=tries)
    assert decision.action == action
    if action == "fail":
        assert decision.reason == tries.reason


def test_a_champion_that_fails_hands_over_to_the_version_that_stands_by() -> None:
    standby = replace(row("standby"), version=1)
    assert decide("champion", "failed", successor=standby).successor == standby
    assert decide("champion", "failed").successor is None
    refused = StartTries(1, "refused", False, 0.0)
    assert decide("champion", None, tries=refused, successor=standby).successor == standby
    assert decide("standby", "failed", successor=standby).successor is None
    assert decide("warming", "failed", successor=standby).successor is None


def test_a_champion_that_nobody_can_stand_in_for_is_started_again_and_again() -> None:
    again = decide("champion", "failed")
    assert (again.action, again.reason) == ("start_again", "it broke")
    failed = StartTries(10**6, "it broke", True, 29.0)
    assert decide("champion", "failed", tries=failed).action == "wait"
    failed = replace(failed, seconds_since_last=31.0)
    assert decide("champion", "failed", tries=failed).action == "start_again"
    assert decide("champion", "scheduling", tries=failed).action == "wait"
    back = decide("champion", "running", tries=failed)
    assert (back.action, back.state) == ("enter", "champion")
    refused = StartTries(1, "refused", False, 99.0)
    assert decide("champion", "failed", tries=refused).action == "fail"
    assert decide("standby", "failed").action == "fail"


def test_a_standby_without_a_champion_takes_over_once_it_runs() -> None:
    assert decide("standby", "running", has_champion=False).action == "promote"
    assert decide("standby", "scheduling", has_champion=False).action == "wait"


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


class Limits(BaseModel):
    max_calls: int = Field(le=5)


def test_an_error_of_the_start_is_one_line_too() -> None:
    with pytest.raises(ValueError, match="max_calls") as refused:
        Limits(max_calls=9)
    told = describe_error(refused.value)
    assert told == "max_calls: Input should be less than or equal to 5"
    assert describe_error(NotFoundError("no such model", hint="train it")) == (
        "no such model; train it"
    )
    assert describe_error(RuntimeError("Traceback\n  File\nx.YError: worn out")) == "worn out"
    assert describe_error(TimeoutError()) == "TimeoutError"
    assert len(describe_error(RuntimeError("x" * 10_000))) == 500


def test_a_version_with_notice_hands_over_in_time_and_ends() -> None:
    heir = row("standby")
    decided = decide("champion", "running", seconds_to_sunset=4, successor=heir)
    assert (decided.action, decided.successor) == ("hand_over", heir)
    assert decide("champion", "running", seconds_to_sunset=6, successor=heir).action == "wait"
    assert decide("champion", "running", seconds_to_sunset=4).action == "wait"
    assert decide("standby", "running", seconds_to_sunset=4, successor=heir).action == "wait"
    for state in ("champion", "standby"):
        assert decide(state, None, seconds_to_sunset=0).action == "retire"
    assert decide("champion", "running", seconds_to_sunset=-1, successor=heir).successor == heir


def test_a_version_whose_notice_is_over_is_remembered() -> None:
    seen = Observation(replace(row("retiring"), sunset_at=AT), None, 0.0)
    decided = ReleasePolicy().decide(seen)
    assert (decided.action, decided.state) == ("enter", "retired")


def test_what_is_compared_becomes_champion_where_there_is_none() -> None:
    assert decide("canary", "running", has_champion=False).action == "promote"
    assert decide("canary", "starting", has_champion=False).action == "wait"
