"""What may be asked for, given what is deployed: pure, each answer with its reason.

admission = admit(version, options, rows)      # raises ConflictError where it cannot be
row, reason = rollback_target("digits", rows, history)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.aliases import AliasChange
from cluster.errors import ConflictError, NotFoundError
from cluster.registry import ModelVersion
from cluster.releases import STARTING, Deployment


@dataclass(frozen=True)
class Admission:
    """How a version gets deployed.

    keep: it is there already; promote: it stands by; resume: it was about to go and its application
    is still good; create: from nothing, whatever was recorded of it.
    """

    action: Literal["keep", "promote", "resume", "create"]
    row: Deployment | None = None
    """The version's row; None where there is none."""


def admit(
    version: ModelVersion, options: Mapping[str, Any], rows: Sequence[Deployment]
) -> Admission:
    """Decide on the request to make a version the champion.

    Args:
        rows: all deployments of the model.

    Raises:
        ConflictError: another version is on its way, or this one runs with other options.
    """
    for other in rows:
        if other.state in STARTING and other.version != version.version:
            raise ConflictError(
                f"version {other.version} of '{other.name}' is being deployed ({other.state})",
                hint="wait until it is champion or failed",
            )
    row = _of_version(rows, version.version)
    if row is None or row.state == "failed":
        return Admission("create", row)
    is_same = row.options == options and row.digest == version.digest
    if row.state == "retiring":
        is_good = is_same and row.started_at is not None
        return Admission("resume" if is_good else "create", row)
    if not is_same:
        raise ConflictError(
            f"{version.ref} is {row.state} with other options",
            hint=f"take it down first: `heliostat undeploy {row.name} --version {row.version}`",
        )
    return Admission("promote" if row.state == "standby" else "keep", row)


def rollback_target(
    name: str, rows: Sequence[Deployment], history: Sequence[AliasChange]
) -> tuple[Deployment, str]:
    """The latest champion before this one that stands by, and the reason to record.

    Args:
        history: every move of the champion alias, oldest first.

    Raises:
        NotFoundError: the model was never released.
        ConflictError: there is no earlier champion, or it is not up any more.
    """
    if not history:
        raise NotFoundError(
            f"model '{name}' was never released", hint="see `heliostat releases list`"
        )
    current = next((row.version for row in rows if row.state == "champion"), None)
    reached = [change.to_version for change in reversed(history)]
    earlier = [version for version in reached if version not in (None, current)]
    for version in earlier:
        row = _of_version(rows, version)
        if row is not None and row.state == "standby":
            return row, f"rolled back from {f'version {current}' if current else 'no champion'}"
    if not earlier:
        raise ConflictError(
            f"model '{name}' has no champion before version {current}",
            hint="deploy the version you want",
        )
    row = _of_version(rows, earlier[0])
    what = "the last champion" if current is None else f"the champion before {current}"
    raise ConflictError(
        f"version {earlier[0]} of '{name}', {what}, is {row.state if row else 'not up any more'}",
        hint=f"deploy it: `heliostat deploy {name}/{earlier[0]}`",
    )


def successor_of(row: Deployment, rows: Sequence[Deployment]) -> Deployment | None:
    """Who goes on for a version that is taken down by hand: the champion's standby."""
    if row.state != "champion":
        return None
    return next((other for other in rows if other.state == "standby"), None)


def _of_version(rows: Sequence[Deployment], version: int | None) -> Deployment | None:
    return next((row for row in rows if row.version == version), None)
