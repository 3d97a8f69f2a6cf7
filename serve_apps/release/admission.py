"""What may be asked for, given what is deployed: pure, each answer with its reason.

admission = admit(version, options, rows)      # raises ConflictError where it cannot be
row, reason = rollback_target("digits", rows, history)
row = release_under_way("digits", rows)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.aliases import AliasChange
from cluster.errors import ConflictError, NotFoundError
from cluster.registry import ModelVersion
from cluster.releases import COMPARED, OVER, STARTING, Deployment, State, Strategy
from serve_apps.options import of_replicas

_UNDER_WAY = (*STARTING, *COMPARED)
_BACK_FROM = "rolled back from "
"""How the reasons of rollbacks begin in an alias's history."""


@dataclass(frozen=True)
class Admission:
    """How a version gets deployed.

    keep: it is there already; promote: it stands by; compare: it stands by, and is to show first
    that it is no worse; resume: it was about to go and its application is still good; create: from
    nothing, whatever was recorded of it.
    """

    action: Literal["keep", "promote", "compare", "resume", "create"]
    row: Deployment | None = None
    """The version's row; None where there is none."""


def admit(
    version: ModelVersion,
    options: Mapping[str, Any],
    rows: Sequence[Deployment],
    strategy: Strategy = "direct",
) -> Admission:
    """Decide on the request to make a version the champion.

    Args:
        rows: all deployments of the model.

    Raises:
        ConflictError: another version is on its way, or this one runs with other options.
    """
    for other in rows:
        if other.state in _UNDER_WAY and other.version != version.version:
            raise ConflictError(
                f"version {other.version} of '{other.name}' is being deployed ({other.stage})",
                hint="wait until it is champion or has failed, or end that: "
                f"`heliostat releases rollback {other.name}`",
            )
    row = _of_version(rows, version.version)
    if row is None or row.state in OVER:
        return Admission("create", row)
    # How it is compared and watched is no matter of its replicas.
    is_same = of_replicas(row.options) == of_replicas(options) and row.digest == version.digest
    if row.state == "retiring":
        is_good = is_same and row.started_at is not None
        return Admission("resume" if is_good else "create", row)
    if not is_same:
        raise ConflictError(
            f"{version.ref} is {row.state} with other options",
            hint=f"take it down first: `heliostat undeploy {row.name} --version {row.version}`",
        )
    if row.state != "standby":
        return Admission("keep", row)
    has_champion = any(other.state == "champion" for other in rows)
    return Admission("compare" if has_champion and strategy != "direct" else "promote", row)


def require_same_release(row: Deployment, strategy: Strategy, options: Mapping[str, Any]) -> None:
    """Raises ConflictError if a version is on its way to champion otherwise than is asked for."""
    if row.state in _UNDER_WAY and (row.strategy != strategy or row.options != options):
        how = "other options" if row.strategy == strategy else f"strategy {row.strategy}"
        raise ConflictError(
            f"version {row.version} of '{row.name}' is being deployed already ({row.stage}), "
            f"with {how}",
            hint=f"wait for it, or end it first: `heliostat releases rollback {row.name}`",
        )


def require_up(row: Deployment, rows: Sequence[Deployment], down: Collection[str]) -> None:
    """Raises ConflictError if customers of a champion would be sent to a version that is down."""
    if row.application in down and any(other.state == "champion" for other in rows):
        raise ConflictError(
            f"version {row.version} of '{row.name}' is {row.stage}, but none of its replicas is up",
            hint="try again when `heliostat releases list` shows some",
        )


def release_under_way(name: str, rows: Sequence[Deployment]) -> Deployment:
    """The version on its way to champion.

    Raises:
        ConflictError: there is none.
    """
    row = find_under_way(rows)
    if row is None:
        raise ConflictError(
            f"no version of '{name}' is on its way to champion",
            hint=f"see `heliostat releases status {name}`",
        )
    return row


def find_under_way(rows: Sequence[Deployment]) -> Deployment | None:
    """The version on its way to champion, if there is one."""
    return next((row for row in rows if row.state in _UNDER_WAY), None)


def rollback_target(
    name: str,
    rows: Sequence[Deployment],
    history: Sequence[AliasChange],
    down: Collection[str] = (),
) -> tuple[Deployment, str]:
    """The latest champion before this one that stands by, and the reason to record.

    Asked again, it goes further back, never to what was rolled back from.

    Args:
        history: every move of the champion alias, oldest first.
        down: applications that do not answer now.

    Raises:
        NotFoundError: the model was never released.
        ConflictError: there is no earlier champion, or it is not up any more.
    """
    if not history:
        raise NotFoundError(
            f"model '{name}' was never released", hint="see `heliostat releases list`"
        )
    current = next((row.version for row in rows if row.state == "champion"), None)
    earlier = [version for version in _champions_before(history) if version != current]
    able = [row for row in rows if current is None or row.application not in down]
    for version in earlier:
        row = _of_version(able, version)
        if row is not None and row.state == "standby":
            return row, f"{_BACK_FROM}{f'version {current}' if current else 'no champion'}"
    if not earlier:
        raise ConflictError(
            f"model '{name}' has no champion before version {current}",
            hint="deploy the version you want, also one that was rolled back",
        )
    row = _of_version(rows, earlier[0])
    if row is not None and row.state == "standby":
        require_up(row, rows, down)
    what = "the last champion" if current is None else f"the champion before {current}"
    raise ConflictError(
        f"version {earlier[0]} of '{name}', {what}, is {row.state if row else 'not up any more'}",
        hint=f"deploy it: `heliostat deploy {name}/{earlier[0]}`",
    )


def heir_of(row: Deployment, rows: Sequence[Deployment], at: str) -> Deployment | None:
    """Who goes on for a champion that ends: its standby, or else what is compared with it.

    Args:
        at: when; UTC, ISO 8601. Whose notice is over by then, or with this one's, does not go on.
    """
    if row.state != "champion":
        return None
    end = max(at, row.sunset_at or at)
    able = [
        o for o in rows if o.version != row.version and (o.sunset_at is None or o.sunset_at > end)
    ]
    order: tuple[State, ...] = ("standby", "canary", "shadow")
    found = [other for state in order for other in able if other.state == state]
    return found[0] if found else None


def _champions_before(history: Sequence[AliasChange]) -> list[int]:
    """Champions to go back to, the latest first: those that no rollback has left."""
    found: list[int] = []
    for change in history:
        if change.to_version is None:
            continue
        if change.reason.startswith(_BACK_FROM) and change.to_version in found:
            del found[len(found) - found[::-1].index(change.to_version) :]
        else:
            found.append(change.to_version)
    return found[::-1]


def _of_version(rows: Sequence[Deployment], version: int | None) -> Deployment | None:
    return next((row for row in rows if row.version == version), None)
