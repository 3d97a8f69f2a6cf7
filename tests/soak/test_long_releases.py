"""A day of releases in minutes: every kind of bad version again and again, and nobody notices."""

from __future__ import annotations

import time

import pytest

from cluster.cli.live_load import LiveLoad
from tests.live_releases import LABELS, NAME, OPTIONS, ROWS, Releases, assert_unharmed

pytestmark = [pytest.mark.soak, pytest.mark.stack, pytest.mark.timeout(1800)]

NUM_ROUNDS = 3
CRASHES_AFTER = 100


def test_good_and_bad_versions_in_turn(releases: Releases) -> None:
    for number in range(NUM_ROUNDS):
        with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
            for strategy in ("canary", "shadow"):
                good = releases.publish(0.001 + number / 10_000)
                assert releases.release(good, strategy)["state"] == "champion"
                unloadable = releases.publish(0.002)
                releases.tamper(unloadable)
                assert releases.release(unloadable, strategy)["state"] == "failed"
                other = releases.publish(0.003, has_other_golden=True)
                assert releases.release(other, strategy)["state"] == "failed"
                failing = releases.publish(0.004, fails=True)
                row = releases.release(failing, strategy)
                assert row["state"] == "rolled_back", row["reason"]
            releases.admin.steer(NAME, "rollback")
            time.sleep(2)
        assert_unharmed(load.seen)


def test_a_version_that_crashes_after_every_hundred_requests(releases: Releases) -> None:
    """A crash costs the few requests that are under way, so the margin is small."""
    crashing = releases.publish(0.005)
    ref = f"{NAME}/{crashing}"
    strict = {
        **OPTIONS["release"],
        "margins": {"errors": 0.005, "slow": 0.5},
        "min_observations": 10**6,
        "max_duration_s": 3600,
    }
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        releases.ask(crashing, "canary", release=strict)
        num_seen = 0
        while (row := releases.admin.deployment(NAME, crashing))["state"] != "rolled_back":
            assert row["state"] not in ("failed", "champion"), row["reason"]
            if load.seen.by_version[ref] >= num_seen + CRASHES_AFTER:
                assert releases.kill(crashing)
                num_seen = load.seen.by_version[ref]
            time.sleep(0.05)
        assert "errors" in row["reason"], row["reason"]
    assert_unharmed(load.seen)
