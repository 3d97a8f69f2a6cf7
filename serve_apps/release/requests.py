"""What people ask for, written into the tables: deploy, undeploy, roll back.

Each request is one transaction that no other writer runs beside, so two at once never both
succeed where one of them must not. All of it blocks: call it in a thread.

    requests = ReleaseRequests(store, registry, applications)
    row = requests.deploy("digits/3", "direct", {}, actor="ops/key_1")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.errors import NotFoundError
from cluster.model_ref import CANDIDATE, ModelRef, check_name
from cluster.registry import ModelRegistry, ModelVersion
from cluster.releases import Deployment, ReleaseStore
from serve_apps.options import check_strategy, read_options
from serve_apps.release.admission import admit, rollback_target, successor_of
from serve_apps.release.applications import Applications
from serve_apps.release.placement import check_room


class ReleaseRequests:
    """Records what is wanted; the reconciler makes it so."""

    def __init__(
        self, store: ReleaseStore, registry: ModelRegistry, applications: Applications
    ) -> None:
        self._store = store
        self._registry = registry
        self._applications = applications

    def deploy(self, ref: str, strategy: str, options: dict[str, Any], actor: str) -> Deployment:
        """Ask for a version to become the champion.

        Raises:
            NotFoundError: no such model or version.
            ConflictError: another version of it is on its way, it runs with other options, or no
                node has room for its replicas.
            UsageError: the strategy or an option is not known.
        """
        check_strategy(strategy)
        wanted = read_options(options).model_dump()
        version = self._version_to_deploy(ref)
        nodes = self._applications.nodes()
        with self._store.writing() as tables:
            admission = admit(version, wanted, tables.deployments(version.name))
            row = admission.row
            if row is not None and admission.action == "keep":
                return row
            if row is not None and admission.action == "promote":
                return tables.promote(row, actor=actor, reason=f"deployed again by {actor}")
            check_room(str(version.ref), wanted, nodes, tables.deployments())
            if row is not None and admission.action == "resume":
                reason = f"deployed again by {actor}"
                return tables.ask_again(row, "deploying", reason, actor=actor, strategy="direct")
            reason = f"deployed by {actor}"
            return tables.create(
                version.name, version.version, version.digest, wanted, reason, requested_by=actor
            )

    def undeploy(self, name: str, version: int | None, actor: str) -> Sequence[Deployment]:
        """Take one version, or all of a model, out of service; returns what is left of the model.

        A champion's traffic goes to the version that stands by, unless all are taken down.

        Raises:
            NotFoundError: nothing of it is deployed.
        """
        check_name(name)
        with self._store.writing() as tables:
            rows = tables.deployments(name)
            chosen = [row for row in rows if version in (None, row.version)]
            if not chosen:
                what = "" if version is None else f"version {version} of "
                raise NotFoundError(
                    f"{what}model '{name}' is not deployed", hint="see `heliostat releases list`"
                )
            for row in chosen:
                # Asked twice, it goes on draining from the first time.
                if row.state != "retiring":
                    successor = successor_of(row, rows) if version is not None else None
                    reason = f"undeployed by {actor}"
                    tables.take_down(row, "retiring", reason, actor=actor, successor=successor)
            return tables.deployments(name)

    def rollback(self, name: str, actor: str) -> Deployment:
        """Give the traffic and the champion alias back to the champion before this one.

        Raises:
            NotFoundError: the model was never released.
            ConflictError: there is no earlier champion, or it is not up any more.
        """
        check_name(name)
        with self._store.writing() as tables:
            history = tables.champion_history(name)
            row, reason = rollback_target(name, tables.deployments(name), history)
            return tables.promote(row, actor=actor, reason=reason)

    def describe(self, name: str) -> dict[str, Any]:
        """All about one model: versions, traffic, and the champion's history.

        Raises:
            NotFoundError: the model was never deployed.
        """
        check_name(name)
        rows, history = self._store.deployments(name), self._store.champion_history(name)
        if not rows and not history:
            raise NotFoundError(
                f"model '{name}' was never deployed", hint="see `heliostat releases list`"
            )
        return {
            "name": name,
            "weights": {str(v): weight for v, weight in self._store.weights(name).items()},
            "deployments": [asdict(row) for row in rows],
            "history": [asdict(change) for change in history],
        }

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
