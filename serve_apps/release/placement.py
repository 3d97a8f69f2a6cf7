"""Whether a cluster has room for replicas: pure, from what they ask and what the nodes have.

Without this, Serve would wait for ever for a GPU that no node has. Counts what was promised to
other model versions, not what trainings use now: those end.

    check_room("digits/3", {"num_gpus": 1}, applications.nodes(), store.deployments())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import ConflictError
from cluster.releases import SERVING, STARTING, Deployment
from serve_apps.options import DeploymentOptions, read_stored_options
from serve_apps.release.applications import Node

_KINDS = (("GPU", "num_gpus"), ("CPU", "num_cpus"))
_TOLERANCE = 1e-6


def check_room(
    ref: str, values: Mapping[str, Any], nodes: Sequence[Node], rows: Sequence[Deployment]
) -> None:
    """Raises ConflictError where replicas cannot be placed, with what is asked and what there is.

    Args:
        values: options of the version to deploy.
        rows: all deployments; those that are up or on their way keep what they were promised.
    """
    options = DeploymentOptions.model_validate(values)
    others = {
        f"{row.name}/{row.version}": read_stored_options(row.options)
        for row in rows
        if row.state in (*STARTING, *SERVING)
    }
    for kind, field in _KINDS:
        _check_one_replica(ref, options, nodes, kind, field)
    _check_all_replicas(ref, options, nodes)
    for kind, field in _KINDS:
        _check_promises(ref, options, nodes, others, kind, field)


def _check_one_replica(
    ref: str, options: DeploymentOptions, nodes: Sequence[Node], kind: str, field: str
) -> None:
    asked = getattr(options, field)
    largest = max((getattr(node, field) for node in nodes), default=0)
    if asked > largest + _TOLERANCE:
        raise ConflictError(
            f"each replica of {ref} asks for {asked:g} {kind}, "
            f"and no node of this cluster has more than {largest:g}",
            hint=f"set {field} to what a node has, or add a larger node",
        )


def _check_all_replicas(ref: str, options: DeploymentOptions, nodes: Sequence[Node]) -> None:
    wanted = options.initial_replicas
    room = sum(_replicas_on(node, options, wanted) for node in nodes)
    if room < wanted:
        raise ConflictError(
            f"{ref} asks for {wanted} × ({options.num_gpus:g} GPU and {options.num_cpus:g} CPU), "
            f"and this cluster's nodes have room for {room}",
            hint="ask for fewer replicas, or add nodes",
        )


def _check_promises(
    ref: str,
    options: DeploymentOptions,
    nodes: Sequence[Node],
    others: Mapping[str, DeploymentOptions],
    kind: str,
    field: str,
) -> None:
    asked = getattr(options, field) * options.initial_replicas
    promised = {name: getattr(o, field) * o.min_replicas for name, o in others.items()}
    has, taken = sum(getattr(node, field) for node in nodes), sum(promised.values())
    if asked and asked > has - taken + _TOLERANCE:
        holders = ", ".join(name for name, amount in promised.items() if amount)
        raise ConflictError(
            f"{ref} asks for {asked:g} {kind}, and {taken:g} of this cluster's {has:g} "
            f"are promised to {holders}",
            hint="take one down: `heliostat undeploy NAME --version VERSION`",
        )


def _replicas_on(node: Node, options: DeploymentOptions, wanted: int) -> int:
    """How many replicas fit on an empty node, at most as many as are wanted."""
    counts = [wanted]
    for _, field in _KINDS:
        asked = getattr(options, field)
        if asked:
            counts.append(int((getattr(node, field) + _TOLERANCE) / asked))
    return min(counts)
