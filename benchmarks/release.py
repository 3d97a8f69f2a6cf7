"""Releases: how soon a bad version is found, how soon a rollback is felt, what watching costs.

The first is simulated with the policy that decides live: customers' requests that a canary of 5 %
answers until it is rolled back, against a test that is looked at once, at a number of requests
fixed before (two proportions, the same alpha for each metric and phase, nine chances in ten to find
a share of bad answers that is twice the margin above the champion's). The others are live; what
mirroring costs the customers is the p99 of the same load with and without a version in shadow, in
turns, at 40 % of what the same clients reach without a pause.

    python -m benchmarks.run release
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import norm

from benchmarks.measure import Row, row_of
from cluster.cli.live_load import LiveLoad, Seen
from serve_apps.release.options import ReleaseOptions
from tests.live_releases import LABELS, NAME, OPTIONS, ROWS, Releases
from tests.replica_processes import cpu_seconds, replicas
from tests.simulated_release import CHAMPION, Model, Release
from tests.stack import Stack, new_stack

SEEDS = 40
ROLLBACKS = 5
SHADOW_PAIRS, SHADOW_S, SHADOW_LOAD = 9, 12.0, 0.4
IDLE_S = 20.0
_NUM_METRICS, _NUM_PHASES = 8, 3
_BAD = {
    "20 % wrong labels": (Model(differs=0.2), "label_disagreement", 0.0),
    "20 % errors": (Model(errors=0.2), "errors", CHAMPION.errors),
    "every request fails": (Model(errors=1.0), "errors", CHAMPION.errors),
    "90 % slower than the champion's slow ones": (Model(slow=0.9), "slow", CHAMPION.slow),
}


def measure() -> tuple[Row, ...]:
    return (*_simulated(), *_live())


def _simulated() -> Iterator[Row]:
    for what, (model, metric, level) in _BAD.items():
        served = []
        for seed in range(SEEDS):
            release = Release("canary", model, seed, look=20)
            decision = release.run()
            if decision.action != "roll_back":
                raise RuntimeError(f"{what} was not rolled back: {decision.reason}")
            # Found before the canary answered anybody, it still was found by one observation.
            served.append(float(max(1, release.num_served)))
        horizon = float(_fixed_horizon(level, getattr(ReleaseOptions().margins, metric)))
        yield row_of(
            f"customers' requests that a bad canary answers: {what}",
            pairs=[(number, horizon) for number in served],
            peer_name="a test with a fixed number of requests",
            at_most=1.0,
        )


def _fixed_horizon(level: float, margin: float) -> int:
    """Requests of the canary, where the champion has plenty."""
    alpha = ReleaseOptions().alpha / (_NUM_METRICS * _NUM_PHASES)
    null, bad = level + margin, level + 2 * margin
    deviations = float(norm.isf(alpha)) * (null * (1 - null)) ** 0.5
    deviations += float(norm.isf(0.1)) * (bad * (1 - bad)) ** 0.5
    return int((deviations / margin) ** 2) + 1


def _live() -> Iterator[Row]:
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    stack = new_stack(directory)
    try:
        up = stack.up()
        if up.returncode:
            raise RuntimeError(f"the stack did not start: {up.stderr}")
        releases = Releases(stack, directory)
        releases.begin()
        good = releases.publish(0.001)
        pairs = [(_rollback_s(releases, good), 1.0) for _ in range(ROLLBACKS)]
        yield row_of(
            "s from `rollback` to the last answer of the version that goes, under load",
            pairs=pairs,
            peer_name="the second that is allowed",
            at_most=1.0,
        )
        yield row_of(
            "ms, p99 of customers at 40 % load while a version is in shadow",
            pairs=_shadow_pairs(releases),
            peer_name="the same load without it",
            at_most=1.1,
        )
        yield row_of(
            "CPU ms per s of an idle controller, two versions up",
            pairs=[(_idle_ms(stack), 10.0) for _ in range(2)],
            peer_name="a hundredth of a core",
            at_most=1.0,
        )
    finally:
        stack.run_cli("down")
        shutil.rmtree(directory, ignore_errors=True)


def _rollback_s(releases: Releases, version: int) -> float:
    row = releases.release(version, "direct")
    if row["state"] != "champion":
        raise RuntimeError(row["reason"])
    ref = f"{NAME}/{version}"
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        while not load.seen.by_version[ref]:
            time.sleep(0.01)
        begun_s = last_s = time.monotonic()
        known = load.seen.by_version[ref]
        releases.admin.steer(NAME, "rollback")
        while time.monotonic() - last_s < 2.0:
            if load.seen.by_version[ref] != known:
                known, last_s = load.seen.by_version[ref], time.monotonic()
            time.sleep(0.005)
    if load.seen.num_failed:
        raise RuntimeError(f"requests failed: {load.seen.failures}")
    return last_s - begun_s


def _shadow_pairs(releases: Releases) -> list[tuple[float, float]]:
    """Two versions are up all the time, and change places: no replica begins or ends meanwhile."""
    rate = SHADOW_LOAD * _most_requests_per_s(releases)
    pairs = []
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS, requests_per_s=rate) as load:
        for number in range(SHADOW_PAIRS):
            order = (False, True) if number % 2 else (True, False)
            p99_ms = {is_mirrored: _p99_ms(releases, load, is_mirrored) for is_mirrored in order}
            pairs.append((p99_ms[True], p99_ms[False]))
    if load.seen.num_failed:
        raise RuntimeError(f"requests failed: {load.seen.failures}")
    return pairs


def _most_requests_per_s(releases: Releases) -> float:
    settings, seconds = releases.stack.settings, 5.0
    with LiveLoad(settings, NAME, ROWS, LABELS, requests_per_s=math.inf) as load:
        time.sleep(1.0)
        num_before = load.seen.num_requests
        time.sleep(seconds)
        return (load.seen.num_requests - num_before) / seconds


def _p99_ms(releases: Releases, load: LiveLoad, is_mirrored: bool) -> float:
    versions = {row["state"]: row["version"] for row in _release(releases)["deployments"]}
    if is_mirrored and "shadow" not in versions:
        endless = {**OPTIONS["release"], "min_observations": 10**9, "max_duration_s": 86_400}
        releases.ask(versions["standby"], "shadow", release=endless)
    elif not is_mirrored and "shadow" in versions:
        releases.admin.steer(NAME, "promote")
    time.sleep(1.0)
    num_before = len(load.seen.latencies_ms)
    time.sleep(SHADOW_S)
    seen = Seen(latencies_ms=load.seen.latencies_ms[num_before:])
    arms = {line["arm"] for line in _release(releases)["evidence"]}
    if is_mirrored != ("pair" in arms):
        raise RuntimeError(f"requests were mirrored: {'pair' in arms}, wanted: {is_mirrored}")
    return seen.quantile_ms(0.99)


def _release(releases: Releases) -> dict[str, Any]:
    return releases.admin.release(NAME)


def _idle_ms(stack: Stack) -> float:
    (controller,) = replicas(stack, "controller", 1)
    before_s = cpu_seconds(controller)
    time.sleep(IDLE_S)
    return 1e3 * (cpu_seconds(controller) - before_s) / IDLE_S
