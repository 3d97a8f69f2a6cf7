"""The watchdog: a process that waits for ever is ended, one that waits with reason is not."""

from __future__ import annotations

import threading

import pytest

from jobs.training.watchdog import HUNG_EXIT_CODE, Watchdog


def test_without_a_sign_of_life_the_process_ends() -> None:
    ended, told, codes = threading.Event(), list[float](), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with Watchdog(0.05, told.append, end) as watchdog:
        watchdog.beat()
        assert ended.wait(30)
    assert codes == [HUNG_EXIT_CODE]
    assert told[0] > 0.05


def test_a_report_that_hangs_saves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.training.watchdog._REPORT_TIMEOUT_S", 0.05)
    ended, never = threading.Event(), threading.Event()
    with Watchdog(0.02, lambda _s: never.wait(30), lambda _code: ended.set()) as watchdog:
        watchdog.beat()
        assert ended.wait(20)
    never.set()


def test_nobody_is_watched_before_the_first_beat_and_while_at_rest() -> None:
    ended = threading.Event()
    with Watchdog(0.01, lambda _seconds: None, lambda _code: ended.set()) as watchdog:
        assert not ended.wait(0.1)
        watchdog.beat()
        watchdog.rest()
        assert not ended.wait(0.1)
