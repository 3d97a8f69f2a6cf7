"""A day of releases in minutes: every kind of bad version again and again, and nobody notices."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from cluster.cli.live_load import LiveLoad, Seen
from tests.live_releases import LABELS, NAME, ROWS, Releases
from tests.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.stack, pytest.mark.timeout(1800)]

NUM_ROUNDS = 3
CRASHES_AFTER = 100


@pytest.fixture(scope="module")
def releases(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    found = Releases(stack, tmp_path_factory.mktemp("versions"))
    found.begin()
    yield found
    found.admin.undeploy(NAME, None)


def assert_unharmed(seen: Seen) -> None:
    assert seen.num_failed == 0, seen.failures
    assert not +seen.wrong_by_version


def test_good_and_bad_versions_in_turn(releases: Releases) -> None:
    for number in range(NUM_ROUNDS):
        with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
            for strategy in ("canary", "shadow"):
                good = releases.publish(0.001 + number / 10_000)
                assert releases.release(good, strategy)["state"] == "champion"
                unloadable = releases.publish(0.002)
                releases.tamper(unloadable)
                assert releases.release(unloadable, strategy)["state"] == "failed"
                failing = releases.publish(0.003, fails=True)
                row = releases.release(failing, strategy)
                assert row["state"] == "rolled_back", row["reason"]
            releases.admin.steer(NAME, "rollback")
            time.sleep(2)
        assert_unharmed(load.seen)


def test_a_version_that_crashes_after_a_hundred_requests(releases: Releases) -> None:
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        crashing = releases.publish(0.004)
        releases.ask(crashing, "canary")
        while load.seen.by_version[f"{NAME}/{crashing}"] < CRASHES_AFTER:
            state = releases.admin.deployment(NAME, crashing)["state"]
            assert state not in ("failed", "rolled_back", "champion"), state
            time.sleep(0.05)
        while releases.admin.deployment(NAME, crashing)["state"] == "canary":
            releases.kill(crashing)
            time.sleep(0.2)
        row = releases.settled(crashing)
        assert row["state"] == "rolled_back", row["reason"]
    assert_unharmed(load.seen)


def test_other_numbers_of_replicas_and_other_options(releases: Releases) -> None:
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        for shift, options in (
            (0.005, {"num_replicas": 2}),
            (0.006, {"max_batch_size": 8, "request_timeout_s": 10}),
            (0.007, {"autoscaling": {"min_replicas": 1, "max_replicas": 2}}),
        ):
            version = releases.publish(shift)
            releases.ask(version, "canary", **options)
            row = releases.settled(version)
            assert row["state"] == "champion", row["reason"]
    assert_unharmed(load.seen)
