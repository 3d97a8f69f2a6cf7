"""What cannot be placed is refused at once, with the numbers; what can be is not."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConflictError
from cluster.releases import Deployment, State
from serve_apps.release.applications import Node
from serve_apps.release.placement import check_room

LAPTOP = Node(num_cpus=2, num_gpus=0)
GPU_NODE = Node(num_cpus=8, num_gpus=1)


def row(version: int, state: State, **options: Any) -> Deployment:
    return Deployment("m", version, "", f"m.v{version}", state, "", options, "", "")


def scaled(min_replicas: int, max_replicas: int) -> dict[str, int]:
    return {"min_replicas": min_replicas, "max_replicas": max_replicas}


@pytest.mark.parametrize(
    ("options", "nodes", "words"),
    [
        ({"num_gpus": 1}, [LAPTOP], "each replica of m/9 asks for 1 GPU, and no node .* than 0;"),
        ({"num_gpus": 0.5}, [], "asks for 0.5 GPU"),
        ({"num_gpus": 2}, [GPU_NODE, GPU_NODE], "asks for 2 GPU, and no node .* more than 1;"),
        ({"num_cpus": 3}, [LAPTOP], "asks for 3 CPU, and no node .* more than 2;"),
        ({"num_gpus": 1, "num_replicas": 2}, [GPU_NODE, LAPTOP], "2 × .* room for 1;"),
        ({"num_gpus": 0.4, "num_replicas": 3}, [GPU_NODE], "3 × .* room for 2;"),
        # Each is there, but on different nodes.
        ({"num_gpus": 1, "num_cpus": 16}, [GPU_NODE, Node(32, 0)], "room for 0;"),
        ({"num_gpus": 1, "autoscaling": scaled(2, 4)}, [GPU_NODE], "2 × .* room for 1;"),
    ],
)
def test_replicas_without_room_are_refused(
    options: dict[str, Any], nodes: list[Node], words: str
) -> None:
    with pytest.raises(ConflictError, match=words) as caught:
        check_room("m/9", options, nodes, [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({}, [LAPTOP]),
        ({"num_replicas": 200}, [LAPTOP]),
        ({"num_gpus": 0.25, "num_replicas": 4}, [GPU_NODE]),
        ({"num_gpus": 0.1, "num_replicas": 10}, [GPU_NODE]),
        ({"num_gpus": 1, "num_cpus": 8, "num_replicas": 2}, [GPU_NODE, GPU_NODE]),
        # More may be added when the load comes.
        ({"num_gpus": 1, "autoscaling": scaled(0, 4)}, [GPU_NODE]),
    ],
)
def test_replicas_with_room_are_taken(options: dict[str, Any], nodes: list[Node]) -> None:
    check_room("m/9", options, nodes, [])


def test_what_other_versions_were_promised_is_counted() -> None:
    wanted = {"num_gpus": 1}
    standby = row(1, "standby", num_gpus=1)
    with pytest.raises(ConflictError, match="1 of this cluster's 1 are promised to m/1;"):
        check_room("m/2", wanted, [GPU_NODE], [standby, row(3, "champion")])
    check_room("m/2", wanted, [GPU_NODE, GPU_NODE], [standby])
    check_room("m/2", wanted, [GPU_NODE], [row(1, "retiring", num_gpus=1)])
    check_room("m/2", wanted, [GPU_NODE], [row(1, "failed", num_gpus=1)])
    resting = row(1, "standby", num_gpus=1, autoscaling=scaled(0, 1))
    check_room("m/2", wanted, [GPU_NODE], [resting])


def test_a_deployment_with_options_of_another_release_is_no_obstacle() -> None:
    check_room("m/2", {"num_gpus": 1}, [GPU_NODE], [row(1, "champion", num_gpus=0.00001)])
