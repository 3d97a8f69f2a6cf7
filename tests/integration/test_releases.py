"""Releases on the real stack, under constant load: customers see none of what goes wrong.

The demo, `heliostat demo --release`, shows a promotion and a rollback for wrong answers; here are
versions that cannot be loaded or fail while they are compared, and a rollback by hand.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from cluster.cli.live_load import LiveLoad
from cluster.releases import STARTING
from tests.live_releases import ENDS, LABELS, NAME, ROWS, Releases
from tests.replica_processes import processes, replicas
from tests.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(500)]

ROLLBACK_S = 1.0


@pytest.fixture(scope="module")
def releases(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    found = Releases(stack, tmp_path_factory.mktemp("versions"))
    found.begin()
    yield found
    found.admin.undeploy(NAME, None)


def test_customers_see_no_failure_whatever_is_released(releases: Releases) -> None:
    good, unloadable, failing = (
        releases.publish(0.001), releases.publish(0.002), releases.publish(0.003, fails=True),
    )  # fmt: skip
    releases.tamper(unloadable)
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        row = releases.release(good, "canary")
        assert row["state"] == "champion", row["reason"]
        assert load.seen.by_version.keys() >= {f"{NAME}/1", f"{NAME}/{good}"}

        row = releases.release(unloadable, "shadow")
        assert row["state"] == "failed"
        assert "not the one that was published" in row["reason"]

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
    seen = load.seen
    assert seen.num_failed == 0, seen.failures
    assert not +seen.wrong_by_version, "a customer had a wrong answer"
    assert seen.by_version[f"{NAME}/{unloadable}"] == 0


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
    assert load.seen.num_failed == 0, load.seen.failures
    assert not +load.seen.wrong_by_version
    events = [event for event in releases.store.events(NAME) if event.release_id == row.release_id]
    came_to = [event.state for event in events if event.state not in STARTING]
    assert came_to == ["shadow", "canary 50%", "champion"]


def test_the_demo_promotes_the_good_version_and_rolls_the_bad_one_back(stack: Stack) -> None:
    demo = stack.run_cli("demo", "--release", "--fast", timeout_s=450)
    assert demo.returncode == 0, f"{demo.stdout[-3000:]}\n{demo.stderr[-3000:]}"
    assert re.search(r"s  shadow .*\n(.*\n)*.*s  champion ", demo.stdout)
    assert re.search(r"s  rolled_back  .*(disagreement|distance)", demo.stdout)
    assert re.search(r"\d requests, 0 failed; p50 \d+ ms", demo.stdout)
