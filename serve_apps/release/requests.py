"""What people ask for, written into the tables: deploy, hold, promote, roll back, undeploy.

Each request is one transaction that no other writer runs beside, so two at once never both
succeed where one of them must not. All of it blocks: call it in a thread.

    requests = ReleaseRequests(store, registry, applications)
    row = requests.deploy("digits/3", "direct", {}, actor="ops/key_1")
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from cluster.database import later, now
from cluster.errors import ConflictError, NotFoundError
from cluster.model_ref import CANDIDATE, ModelRef, check_name
from cluster.registry import ModelRegistry, ModelVersion
from cluster.releases import COMPARED, Deployment, ReleaseStore
from serve_apps.options import read_options, read_strategy
from serve_apps.release.admission import (
    admit,
    find_under_way,
    heir_of,
    release_under_way,
    require_same_release,
    require_up,
    rollback_target,
)
from serve_apps.release.applications import Applications
from serve_apps.release.comparison import ComparisonPolicy
from serve_apps.release.decisions import go_on
from serve_apps.release.placement import check_room


class ReleaseRequests:
    """Records what is wanted; the reconciler makes it so."""

    def __init__(
        self, store: ReleaseStore, registry: ModelRegistry, applications: Applications
    ) -> None:
        self._store = store
        self._registry = registry
        self._applications = applications

    def deploy(
        self,
        ref: str,
        strategy: str,
        options: dict[str, Any],
        actor: str,
        down: Collection[str] = (),
    ) -> Deployment:
        """Ask for a version to become the champion.

        Args:
            down: applications that do not answer now, so that nobody is sent there.

        Raises:
            NotFoundError: no such model or version.
            ConflictError: another version of it is on its way, it is or runs with other options, or
                no node has room for its replicas.
            InputError: the strategy or an option is not known.
        """
        how = read_strategy(strategy)
        wanted = read_options(options).model_dump(mode="json")
        version = self._version_to_deploy(ref)
        nodes = self._applications.nodes()
        with self._store.writing() as tables:
            rows = tables.deployments(version.name)
            admission = admit(version, wanted, rows, how)
            row = admission.row
            if row is not None and admission.action in ("keep", "promote"):
                # Who names none means those that it has.
                asked = wanted if options else row.options
                require_same_release(row, how, asked)
                row = tables.set_options(row, asked, actor=actor)
            if row is not None and admission.action == "keep":
                if row.sunset_at is None:
                    return row
                return tables.set_sunset(row, None, f"deployed again by {actor}", actor=actor)
            if row is not None and admission.action == "promote":
                require_up(row, rows, down)
                return tables.promote(row, actor=actor, reason=f"deployed again by {actor}")
            if row is not None and admission.action == "compare":
                again = f"deployed again by {actor}"
                row = tables.ask_again(row, "standby", wanted, again, actor=actor, strategy=how)
                decision = ComparisonPolicy().begin(row, has_champion=True, reason=again)
                return go_on(tables, row, decision)
            check_room(str(version.ref), wanted, nodes, tables.deployments())
            if row is not None and admission.action == "resume":
                again = f"deployed again by {actor}"
                return tables.ask_again(row, "deploying", wanted, again, actor=actor, strategy=how)
            return tables.create(
                version.name,
                version.version,
                version.digest,
                wanted,
                f"deployed by {actor}",
                requested_by=actor,
                strategy=how,
            )

    def undeploy(
        self, name: str, version: int | None, notice_s: int | None, actor: str
    ) -> Sequence[Deployment]:
        """Take one version, or all of a model, out of service; returns what is left of the model.

        A champion's traffic goes to the version that stands by, unless all are taken down.

        Args:
            notice_s: for how long it goes on answering, so that its users can leave; afterwards
                they are told that it is gone. None is no notice.

        Raises:
            NotFoundError: nothing of it is deployed.
        """
        check_name(name)
        sunset_at = None if notice_s is None else later(notice_s)
        with self._store.writing() as tables:
            rows = tables.deployments(name)
            chosen = [
                row
                for row in rows
                if row.version == version or (version is None and row.state != "retired")
            ]
            if not chosen:
                what = "" if version is None else f"version {version} of "
                raise NotFoundError(
                    f"{what}model '{name}' is not deployed", hint="see `heliostat releases list`"
                )
            reason = f"undeployed by {actor}"
            for row in chosen:
                if sunset_at is not None and row.state in ("champion", "standby"):
                    shown = f"{reason}: ends at {sunset_at}"
                    tables.set_sunset(row, sunset_at, shown, actor=actor)
                # Asked twice, it goes on draining from the first time.
                elif row.state != "retiring":
                    heir = heir_of(row, rows, now()) if version is not None else None
                    # Without notice it is as if it had never been there.
                    row = tables.set_sunset(row, None, reason, actor=actor)
                    tables.take_down(row, "retiring", reason, actor=actor, successor=heir)
            return tables.deployments(name)

    def rollback(self, name: str, actor: str, down: Collection[str] = ()) -> Deployment:
        """End the release under way; without one, give the traffic and the champion alias back to
        the champion before this one.

        Args:
            down: as for `deploy`.

        Raises:
            NotFoundError: the model was never released.
            ConflictError: there is no earlier champion, or it is not up any more.
        """
        check_name(name)
        with self._store.writing() as tables:
            rows, reason = tables.deployments(name), f"rolled back by {actor}"
            row = find_under_way(rows)
            if row is not None:
                return tables.take_down(row, "rolled_back", reason, actor=actor)
            row, reason = rollback_target(name, rows, tables.champion_history(name), down)
            return tables.promote(row, actor=actor, reason=reason)

    def pause(self, name: str, actor: str) -> Deployment:
        """Let the release under way take no step towards champion; it can still be rolled back.

        Raises:
            ConflictError: no version is on its way to champion.
        """
        return self._set_paused(name, True, f"paused by {actor}", actor)

    def resume(self, name: str, actor: str) -> Deployment:
        """Let a paused release go on; the time of its phase begins anew.

        Raises:
            ConflictError: no version is on its way to champion.
        """
        return self._set_paused(name, False, f"resumed by {actor}", actor)

    def promote(self, name: str, actor: str, down: Collection[str] = ()) -> Deployment:
        """Make the version that is being compared the champion.

        Args:
            down: as for `deploy`.

        Raises:
            ConflictError: none is, or it has not shown yet that it answers.
        """
        check_name(name)
        with self._store.writing() as tables:
            rows = tables.deployments(name)
            row = release_under_way(name, rows)
            if row.state not in COMPARED:
                raise ConflictError(
                    f"version {row.version} of '{name}' is {row.stage}: it does not answer yet",
                    hint="wait until it is in shadow or canary",
                )
            require_up(row, rows, down)
            reason = f"promoted by {actor} in {row.stage}"
            return tables.promote(row, actor=actor, reason=reason)

    def _set_paused(self, name: str, is_paused: bool, reason: str, actor: str) -> Deployment:
        check_name(name)
        with self._store.writing() as tables:
            row = release_under_way(name, tables.deployments(name))
            if row.is_paused == is_paused:
                return row
            return tables.set_paused(row, is_paused, reason, actor=actor)

    def describe(self, name: str) -> dict[str, Any]:
        """All about one model: versions, traffic, the champion's history, the releases' timeline,
        and what the one under way has shown so far.

        Raises:
            NotFoundError: the model was never deployed.
        """
        check_name(name)
        rows, history = self._store.deployments(name), self._store.champion_history(name)
        timeline = self._store.events(name)
        if not (rows or history or timeline):
            raise NotFoundError(
                f"model '{name}' was never deployed", hint="see `heliostat releases list`"
            )
        return {
            "name": name,
            "weights": {str(v): weight for v, weight in self._store.weights(name).items()},
            "deployments": [asdict(row) for row in rows],
            "history": [asdict(change) for change in history],
            "timeline": [asdict(event) for event in timeline],
            "evidence": [line for row in rows for line in self._shown(row)],
        }

    def _shown(self, row: Deployment) -> list[dict[str, Any]]:
        """What its phase has shown, if it is in one: a line for each metric of each arm."""
        if row.state not in COMPARED:
            return []
        return [
            {"version": row.version, "stage": row.stage, "metric": metric, "arm": arm}
            | {"num": sample.num, "mean": sample.mean}
            for (arm, metric), sample in sorted(self._store.evidence(row).items())
        ]

    def _version_to_deploy(self, text: str) -> ModelVersion:
        """The version a reference means here: a bare name is its candidate, or else its newest."""
        ref = ModelRef.parse(text)
        if ref.alias is None and ref.version is None:
            candidate = self._registry.get_alias(ref.name, CANDIDATE)
            if candidate is not None:
                return self._registry.resolve(ModelRef(ref.name, version=candidate.version))
            versions = self._registry.list_versions(ref.name)
            if versions:
                return versions[-1]
        return self._registry.resolve(ref)
