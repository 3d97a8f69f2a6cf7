"""A day of releases in minutes: every kind of bad version again and again, and nobody notices."""

from __future__ import annotations

import time

import pytest

from cluster.cli.live_load import LiveLoad
from tests.live_releases import LABELS, NAME, ROWS, Releases, assert_unharmed

pytestmark = [pytest.mark.soak, pytest.mark.stack, pytest.mark.timeout(1800)]

NUM_ROUNDS = 3


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
