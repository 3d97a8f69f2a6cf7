"""The long forms of what clusters lose: nodes again and again, and the head in every way."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.live_load import LiveLoad
from tests.live_releases import LABELS, NAME, ROWS, Releases, go_on
from tests.replica_processes import processes, replicas
from tests.stack import Stack, new_stack
from tests.worker_node import WorkerNode

pytestmark = [pytest.mark.soak, pytest.mark.stack, pytest.mark.timeout(1800)]

NUM_ROUNDS = 5
HEAD = {
    "control store": "gcs_server",
    "raylet": "raylet/raylet",
    "starter": "bin/ray start",
    "all of it": "gcs_server|raylet/raylet|bin/ray start",
}


@pytest.fixture
def lone_stack() -> Iterator[Stack]:
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    stack = new_stack(directory, num_cpus=1)
    try:
        up = stack.up()
        assert up.returncode == 0, up.stderr
        yield stack
    finally:
        down = stack.run_cli("down")
        assert down.returncode == 0, down.stderr
        shutil.rmtree(directory, ignore_errors=True)


def test_nodes_that_come_and_go_cost_no_request(lone_stack: Stack, tmp_path: Path) -> None:
    releases = Releases(lone_stack, tmp_path)
    version = releases.publish()
    with WorkerNode(lone_stack, num_cpus=1):
        releases.ask(version, "direct", num_replicas=2, num_cpus=1)
        assert releases.settled(version)["state"] == "champion"
    with LiveLoad(lone_stack.settings, NAME, ROWS, LABELS) as load:
        for _ in range(NUM_ROUNDS):
            with WorkerNode(lone_stack, num_cpus=1) as node:
                replicas(lone_stack, f"{NAME}.v{version}", 2, timeout_s=120)
                assert len(node.replicas(NAME)) == 1
                go_on(load, 300)
            go_on(load, 300)
    assert load.seen.num_failed == 0, load.seen.failures


def test_a_head_that_is_killed_in_every_way_serves_again(lone_stack: Stack, tmp_path: Path) -> None:
    """With `heliostat up` and nothing else."""
    releases = Releases(lone_stack, tmp_path)
    releases.begin()
    before = releases.reached(1, "champion")
    for killed, pattern in HEAD.items():
        for process in processes(lone_stack, pattern):
            process.kill()
        again = lone_stack.run_cli("up")
        assert again.returncode == 0, f"{killed}: {again.stderr}"
        with LiveLoad(lone_stack.settings, NAME, ROWS, LABELS) as load:
            go_on(load, timeout_s=120)
        assert releases.reached(1, "champion").release_id == before.release_id
        replicas(lone_stack, f"{NAME}.v1", 1)
