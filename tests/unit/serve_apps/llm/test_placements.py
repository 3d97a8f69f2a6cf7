"""Who reads a stream learns that its replica has to go, and which replicas failed."""

from __future__ import annotations

import pytest

from serve_apps.llm.placements import Placements


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_stream_is_due_some_time_after_its_replica_takes_no_more() -> None:
    clock = Clock()
    placements = Placements(clock)
    with placements.follow("r", drain_s=5) as placement:
        placements.placed("r", "talker.v1", "a")
        placements.replicas_are("talker.v1", {"a", "b"})
        clock.now_s += 50
        assert not placement.is_due
        placements.replicas_are("talker.v1", {"b"})
        clock.now_s += 4
        assert not placement.is_due
        # Another change does not give it more time.
        placements.replicas_are("talker.v1", {"b", "c"})
        clock.now_s += 1
        assert placement.is_due


@pytest.mark.parametrize(
    ("application", "replicas"),
    [("other.v1", {"b"}), ("talker.v1", set()), ("talker.v1", {"a", "b"})],
)
def test_it_stays_where_nobody_else_could_go_on_or_its_replica_does(
    application: str, replicas: set[str]
) -> None:
    placements = Placements()
    with placements.follow("r", drain_s=0) as placement:
        placements.placed("r", "talker.v1", "a")
        placements.replicas_are(application, replicas)
        assert not placement.is_due


def test_a_request_that_nobody_took_or_nobody_follows_is_left_alone() -> None:
    placements = Placements()
    with placements.follow("r", drain_s=0) as placement:
        placements.replicas_are("talker.v1", {"b"})
        assert not placement.is_due
    placements.placed("r", "talker.v1", "a")
    placements.replicas_are("talker.v1", {"b"})
    assert not placement.is_due


def test_a_replica_that_failed_is_suspect_for_a_while() -> None:
    clock = Clock()
    placements = Placements(clock)
    with placements.follow("r", drain_s=0) as placement:
        placements.failed(placement)  # before any replica took it
        placements.placed("r", "talker.v1", "a")
        placements.failed(placement)
    assert placements.is_suspect("talker.v1", "a")
    assert not placements.is_suspect("talker.v1", "b")
    assert not placements.is_suspect("talker.v2", "a")
    clock.now_s += 5
    assert not placements.is_suspect("talker.v1", "a")
