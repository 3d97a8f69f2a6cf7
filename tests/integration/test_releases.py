"""Releases on the real stack, under constant load: customers see none of what goes wrong.

The demo, `heliostat demo --release`, shows a promotion and a rollback for wrong answers; here are
versions that cannot be loaded or fail while they are compared, and a rollback by hand.
"""

from __future__ import annotations

import re
import time

import pytest

from cluster.cli.live_load import LiveLoad
from cluster.releases import STARTING
from tests.live_releases import ENDS, LABELS, NAME, ROWS, Releases, assert_unharmed
from tests.replica_processes import processes, replicas
from tests.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(500)]

ROLLBACK_S = 1.0


def test_customers_see_no_failure_whatever_is_released(releases: Releases) -> None:
    good, unloadable, failing, other = (
        releases.publish(0.001), releases.publish(0.002), releases.publish(0.003, fails=True),
        releases.publish(0.004, has_other_golden=True),
    )  # fmt: skip
    releases.tamper(unloadable)
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        row = releases.release(good, "canary")
        assert row["state"] == "champion", row["reason"]
        assert load.seen.by_version.keys() >= {f"{NAME}/1", f"{NAME}/{good}"}

        row = releases.release(unloadable, "shadow")
        assert row["state"] == "failed"
        assert "not the one that was published" in row["reason"]

        row = releases.release(other, "shadow")
        assert row["state"] == "failed"
        assert "golden" in row["reason"], row["reason"]

        row = releases.release(failing, "canary")
        assert row["state"] == "rolled_back", row["reason"]
        assert "errors" in row["reason"]

        before = load.seen
        back = releases.admin.steer(NAME, "rollback")
        assert back["version"] == 1
        time.sleep(ROLLBACK_S)
        settled = load.seen.by_version[f"{NAME}/{good}"]
        while load.seen.num_requests < before.num_requests + 120:
            time.sleep(0.05)
        assert load.seen.by_version[f"{NAME}/{good}"] <= settled + 4, "those under way"
    assert_unharmed(load.seen)
    assert not {f"{NAME}/{unloadable}", f"{NAME}/{other}"} & load.seen.by_version.keys()


def test_numbers_of_replicas_and_options_change_under_load(releases: Releases) -> None:
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        for shift, options in (
            (0.006, {"num_replicas": 2, "max_batch_size": 8, "request_timeout_s": 10}),
            (0.007, {"autoscaling": {"min_replicas": 1, "max_replicas": 2}}),
        ):
            version = releases.publish(shift)
            releases.ask(version, "direct", **options)
            row = releases.settled(version)
            assert row["state"] == "champion", row["reason"]
            while not load.seen.by_version[f"{NAME}/{version}"]:
                time.sleep(0.05)
    assert_unharmed(load.seen)


def test_a_release_goes_on_whichever_controller_is_killed(releases: Releases) -> None:
    stack = releases.stack
    version = releases.publish(0.004)
    with LiveLoad(stack.settings, NAME, ROWS, LABELS) as load:
        releases.ask(version, "shadow")
        releases.reached(version, "shadow")
        replicas(stack, "controller", 1)[0].kill()
        (serve_controller,) = processes(stack, "ServeController")
        serve_controller.kill()
        releases.reached(version, "canary")
        replicas(stack, "controller", 1)[0].kill()
        row = releases.reached(version, *ENDS)
    assert row.state == "champion", row.reason
    assert_unharmed(load.seen)
    events = [event for event in releases.store.events(NAME) if event.release_id == row.release_id]
    came_to = [event.state for event in events if event.state not in STARTING]
    assert came_to == ["shadow", "canary 50%", "champion"]


def test_the_demo_promotes_the_good_version_and_rolls_the_bad_one_back(stack: Stack) -> None:
    demo = stack.run_cli("demo", "--release", "--fast", timeout_s=450)
    assert demo.returncode == 0, f"{demo.stdout[-3000:]}\n{demo.stderr[-3000:]}"
    assert re.search(r"s  shadow .*\n(.*\n)*.*s  champion ", demo.stdout)
    assert re.search(r"s  rolled_back  .*(disagreement|distance)", demo.stdout)
    assert re.search(r"\d requests, 0 failed; p50 \d+ ms", demo.stdout)
