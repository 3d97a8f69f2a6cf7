"""`heliostat demo --release`: under live load a good version is released and a bad one is not.

Like the other demo it runs the commands and calls the routes that users do. The bad version is one
that was hardly trained; the gate refuses it and is overruled, with the reason on record.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cluster.cli.demo import console, held_out_digits, heliostat, manifest_of, step
from cluster.cli.live_load import LiveLoad, Seen
from cluster.config import read_mapping
from cluster.errors import JobFailedError, UpstreamTimeoutError
from cluster.settings import Settings, load_settings

if TYPE_CHECKING:
    from cluster.admin_client import AdminClient
    from cluster.registry import ModelRegistry, ModelVersion

NAME = "digits-live"
TRAINING = "configs/train/digits.yaml"
GATE = "configs/services/digits.yaml"
SERVING = "configs/serve/digits_released.yaml"
_STEPS = (150, 150, 3)
_GOOD_ENOUGH = 0.5
_POLL_S = 0.25
_TIMEOUT_S = 300.0
_FAST_PHASE_S = 8
_SETTLED = ("champion", "rolled_back", "failed")


def run_release_demo(*, fast: bool = False) -> None:
    """Start the cluster, serve a version under load, release a good one and a bad one.

    Args:
        fast: train all at once, and decide on less evidence.

    Raises:
        JobFailedError: a command failed, a request failed, or a release ended otherwise than it
            must.
    """
    from cluster.admin_client import AdminClient
    from cluster.registry import ModelRegistry

    step("Start the cluster")
    heliostat("up")
    settings = load_settings()
    registry, admin = ModelRegistry.open(settings), AdminClient.open(settings)
    step(f"Three versions of {NAME}: the first, a good one, and a bad one")
    first, good, bad = _train(settings, registry, _STEPS, at_once=fast)
    heliostat("deploy", str(first.ref))
    digest = manifest_of(settings, first).lineage.dataset_digest
    pixels, labels = held_out_digits(settings, digest)
    options = read_mapping(Path(SERVING))
    if fast:
        options["release"]["max_duration_s"] = _FAST_PHASE_S
    with LiveLoad(settings, NAME, pixels, labels) as load:
        step(f"Under load: {good.ref}, which passes the gate")
        _gate(good)
        end = _release(admin, load, good, options)
        _expect(good, end, "champion")
        step(f"Under load: {bad.ref}, trained for three steps; the gate refuses and is overruled")
        _gate(bad, force="planted by the demo, to be rolled back")
        end = _release(admin, load, bad, options)
        _expect(bad, end, "rolled_back")
        time.sleep(1.0)
    step("What the customers saw")
    _print(load.seen)
    if load.seen.num_failed:
        raise JobFailedError(f"{load.seen.num_failed} requests failed: {load.seen.failures[0]}")


def _train(
    settings: Settings, registry: ModelRegistry, steps: Sequence[int], *, at_once: bool
) -> list[ModelVersion]:
    """A version for each number of steps, what was hardly trained last."""
    num_before = len(registry.list_versions(NAME))
    with ThreadPoolExecutor(len(steps) if at_once else 1) as pool:
        # No two are alike, for each has a seed of its own.
        list(pool.map(_submit_training, steps, itertools.count(num_before + 1)))
    # Those of one time are registered in any order.
    versions = registry.list_versions(NAME)[num_before:]
    return sorted(
        versions, key=lambda v: manifest_of(settings, v).metrics["test/accuracy"] < _GOOD_ENOUGH
    )


def _submit_training(steps: int, seed: int) -> None:
    # One process: the other demo shows the training of several.
    overrides = [f"name={NAME}", f"steps={steps}", f"seed={seed}", "resume=never", "launcher=local"]
    if steps < 50:
        overrides.append("schedule.warmup_steps=0")
    heliostat("submit", "train", "--config", TRAINING, *_set(overrides))


def _gate(version: ModelVersion, force: str = "") -> None:
    overrides = [f"service={NAME}", f"model={NAME}", f"candidate={version.ref}"]
    if force:
        overrides.append(f"force={force}")
    heliostat("submit", "promote", "--config", GATE, *_set(overrides))


def _set(overrides: Any) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _release(
    admin: AdminClient, load: LiveLoad, version: ModelVersion, options: dict[str, Any]
) -> dict[str, Any]:
    """Ask for it by shadow and canary, and show each step with the load at that moment."""
    started_s, num_shown = time.monotonic(), 0
    row = admin.deploy(str(version.ref), "shadow", options)
    console.print(f"  {_load_line(load.seen)}")
    while True:
        # Before the timeline, so that it holds how this state was come to.
        now = admin.deployment(version.name, version.version)
        timeline = [
            event
            for event in admin.release(version.name)["timeline"]
            if event["release_id"] == row["release_id"]
        ]
        for event in timeline[num_shown:]:
            moment = f"{time.monotonic() - started_s:5.1f} s"
            console.print(f"{moment}  [bold]{event['state']:<12}[/bold] {event['reason']}")
        if len(timeline) > num_shown:
            num_shown = len(timeline)
            console.print(f"         {_load_line(load.seen)}", style="dim")
        if now["state"] in _SETTLED and now["release_id"] == row["release_id"]:
            return now
        if time.monotonic() - started_s > _TIMEOUT_S:
            raise UpstreamTimeoutError(
                f"{version.ref} is {now['state']} after {_TIMEOUT_S:.0f} s: {now['reason']}",
                hint=f"see `heliostat releases status {version.name}`",
            )
        time.sleep(_POLL_S)


def _load_line(seen: Seen) -> str:
    shares = ", ".join(
        f"{version} {count / seen.num_requests:.0%}"
        for version, count in sorted(seen.by_version.items())
    )
    return f"{seen.num_requests:,} requests so far ({shares}), {seen.num_failed} failed"


def _expect(version: ModelVersion, end: dict[str, Any], state: str) -> None:
    if end["state"] != state:
        raise JobFailedError(f"{version.ref} is {end['state']}, not {state}: {end['reason']}")


def _print(seen: Seen) -> None:
    table = Table("answered by", "requests", "wrong answers", box=None, padding=(0, 2))
    for version, count in sorted(seen.by_version.items()):
        wrong = seen.wrong_by_version[version]
        table.add_row(version, f"{count:,}", f"{wrong:,} ({wrong / count:.1%})")
    console.print(table)
    console.print(
        f"{seen.num_requests:,} requests, [bold]{seen.num_failed} failed[/bold]; "
        f"p50 {seen.quantile_ms(0.5):.0f} ms, p99 {seen.quantile_ms(0.99):.0f} ms"
    )
