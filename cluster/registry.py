"""`ModelRegistry`: which versions of a model there are, and which of them an alias means.

SQL holds the truth, because aliases need compare-and-set and a history; MLflow numbers the versions
and shows them to people. Reading needs SQL alone. A version is a package's digest: registering the
same package twice gives the same version.

    registry = ModelRegistry.open(settings)
    version = registry.register("digits", published, run_id=run_id)
    registry.set_alias("digits", "candidate", version.version, actor="jobs.train", reason="trained")
    registry.resolve(ModelRef.parse("digits@candidate"))
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster import database
from cluster.alias_mirror import AliasEdit, mirror, read_edits
from cluster.aliases import (
    Alias,
    AliasChange,
    describe_history,
    move_alias,
    read_alias,
    read_history,
)
from cluster.database import aliases, deployments, model_versions
from cluster.errors import ConflictError, HeliostatError, NotFoundError, NotRunningError
from cluster.model_package.card import model_card, version_tags
from cluster.model_package.reader import package_key
from cluster.model_package.writer import PublishedPackage
from cluster.model_ref import CHAMPION, ModelRef, check_name
from cluster.security.audit import AuditLog
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import open_client

DIGEST_TAG = "heliostat.digest"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelVersion:
    """One package under one name."""

    name: str
    version: int
    digest: str
    location: str
    kind: str
    run_id: str | None
    parent_digest: str | None
    created_at: str
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.name, version=self.version)


class ModelRegistry:
    """Open it with `ModelRegistry.open(settings)`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    @classmethod
    def open(cls, settings: Settings) -> ModelRegistry:
        return cls(database.open_database(settings.database), settings)

    def register(
        self, name: str, published: PublishedPackage, *, run_id: str | None = None
    ) -> ModelVersion:
        """List a package under a name; its version, new or known.

        Raises:
            NotRunningError: the MLflow server does not answer, and the package is not listed yet.
        """
        check_name(name)
        if (known := self._find_digest(name, published.digest)) is not None:
            return known
        client = open_client(self._settings)
        with _mlflow_errors(self._settings):
            taken = {version.version for version in self.list_versions(name)}
            number = _mlflow_version(client, name, published, run_id, taken)
        row = {
            "name": name,
            "version": number,
            "digest": published.digest,
            "location": published.location,
            "kind": published.manifest.kind,
            "run_id": run_id,
            "parent_digest": published.manifest.lineage.parent_digest or None,
            "created_at": database.now(),
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(model_versions).values(row))
        except sa.exc.IntegrityError:
            return self._lost_race(client, name, number, published.digest)
        return self._version(name, number)

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """The version that a reference means now; a bare name means its champion.

        Raises:
            NotFoundError: naming what there is instead.
        """
        if ref.version is not None:
            return self._version(ref.name, ref.version)
        wanted = ref.alias or CHAMPION
        current = self.get_alias(ref.name, wanted)
        if current is not None:
            return self._version(ref.name, current.version)
        known = self._require_model(ref.name)
        there = ", ".join(
            f"{v.version} ({', '.join(v.aliases) or 'no alias'})" for v in known[-10:]
        )
        raise NotFoundError(
            f"model '{ref.name}' has no alias '{wanted}'",
            hint=f"it has versions {there}; write {ref.name}/{known[-1].version} for the newest",
        )

    def list_versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions, by name and number."""
        query = sa.select(model_versions).order_by(model_versions.c.name, model_versions.c.version)
        if name is not None:
            query = query.where(model_versions.c.name == name)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
            pointers = connection.execute(sa.select(aliases)).mappings().all()
        names: dict[tuple[str, int], list[str]] = {}
        for pointer in pointers:
            names.setdefault((pointer["name"], pointer["version"]), []).append(pointer["alias"])
        return [
            ModelVersion(**row, aliases=tuple(sorted(names.get((row["name"], row["version"]), ()))))
            for row in rows
        ]

    def get_alias(self, name: str, alias: str) -> Alias | None:
        """Where an alias points now; its revision is what `set_alias` can be held to."""
        with self._engine.connect() as connection:
            return read_alias(connection, name, alias)

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int | None,
        *,
        actor: str,
        reason: str,
        expected_revision: int | None = None,
    ) -> None:
        """Point an alias to a version (None removes it), add to its history, tell MLflow.

        Args:
            expected_revision: the revision this decision was made on, 0 for an alias that did not
                exist; None takes the one found now.

        Raises:
            ConflictError: somebody else moved the alias since.
            NotFoundError: no such version.
        """
        check_name(alias)
        if version is not None:
            self._version(name, version)
        change = AliasChange(name, alias, None, version, actor, reason, database.now())
        with self._engine.begin() as connection:
            if not move_alias(connection, change, expected_revision):
                return
        self.mirror_aliases(name)

    def history(self, name: str) -> list[AliasChange]:
        """Every move of the model's aliases, oldest first.

        Raises:
            NotFoundError: no such model.
        """
        with self._engine.connect() as connection:
            changes = read_history(connection, name)
        if not changes:
            self._require_model(name)
        return changes

    def delete_version(self, name: str, version: int) -> None:
        """Remove a version, and its package unless another name lists it.

        Raises:
            ConflictError: an alias points to it, it is deployed, or an adapter needs it.
        """
        found = self._version(name, version)
        if found.aliases:
            raise ConflictError(
                f"{found.ref} is {' and '.join(found.aliases)}",
                hint="move the alias to another version first (`heliostat models alias`)",
            )
        client = open_client(self._settings)
        with self._engine.begin() as connection:
            _refuse_deployed(connection, found)
            _refuse_base(connection, found)
            connection.execute(
                sa.delete(model_versions).where(
                    model_versions.c.name == name, model_versions.c.version == version
                )
            )
            others = connection.scalar(
                sa.select(sa.func.count()).where(model_versions.c.digest == found.digest)
            )
            with _mlflow_errors(self._settings):
                _delete_in_mlflow(client, name, version)
        if not others:
            Storage.open(self._settings.storage_root).delete_dir(package_key(found.digest))

    def _version(self, name: str, version: int) -> ModelVersion:
        for found in self.list_versions(name):
            if found.version == version:
                return found
        known = self._require_model(name)
        numbers = ", ".join(str(v.version) for v in known[-10:])
        raise NotFoundError(
            f"model '{name}' has no version {version}", hint=f"it has versions {numbers}"
        )

    def _require_model(self, name: str) -> list[ModelVersion]:
        if known := self.list_versions(name):
            return known
        names = ", ".join(sorted({v.name for v in self.list_versions()}))
        raise NotFoundError(
            f"model '{name}' does not exist",
            hint=f"there are: {names}" if names else "make one: `heliostat models import --help`",
        )

    def _find_digest(self, name: str, digest: str) -> ModelVersion | None:
        return next((v for v in self.list_versions(name) if v.digest == digest), None)

    def _lost_race(self, client: Any, name: str, number: int, digest: str) -> ModelVersion:
        """Somebody else inserted the same package, or took the number, in between."""
        known = self._find_digest(name, digest)
        if known is None:
            raise ConflictError(
                f"version {number} of '{name}' was registered by somebody else meanwhile",
                hint="try again",
            )
        if known.version != number:
            with _mlflow_errors(self._settings):
                _delete_in_mlflow(client, name, number)
        return known

    def mirror_aliases(self, name: str) -> None:
        """Show the aliases and their history in MLflow; if it is down, the next move does it.

        What somebody changed there by hand is undone, logged and written to the audit log.
        """
        ours = {alias: v.version for v in self.list_versions(name) for alias in v.aliases}
        try:
            client = open_client(self._settings)
            with _mlflow_errors(self._settings):
                edits = mirror(
                    client, name, ours, lambda page: describe_history(self.history(name), page)
                )
        except HeliostatError as error:
            _logger.warning("aliases of '%s' are not shown in MLflow yet: %s", name, error)
            return
        for edit in edits:
            _logger.warning("%s, which is undone: move aliases with `heliostat`", edit)
            detail = {"from": edit.told, "to": edit.shown, "undone": True}
            AuditLog(self._engine).record("mlflow", "alias_edited", f"{name}@{edit.alias}", detail)

    def foreign_edits(self, name: str) -> list[AliasEdit]:
        """Aliases that somebody moved in MLflow since we did; they move nothing here.

        Raises:
            NotRunningError: MLflow does not answer.
        """
        client = open_client(self._settings)
        with _mlflow_errors(self._settings):
            return read_edits(client, name)


def _refuse_deployed(connection: Connection, version: ModelVersion) -> None:
    query = sa.select(deployments.c.state).where(
        deployments.c.name == version.name, deployments.c.version == version.version
    )
    if (state := connection.scalar(query)) is not None:
        raise ConflictError(
            f"{version.ref} is deployed ({state})",
            hint=f"take it down first: `heliostat undeploy {version.name}`",
        )


def _refuse_base(connection: Connection, version: ModelVersion) -> None:
    """An adapter is of no use without the package it was trained on."""
    of_package = model_versions.c.digest == version.digest
    listed = sa.select(sa.func.count()).where(of_package)
    adapters = sa.select(model_versions.c.name, model_versions.c.version).where(
        model_versions.c.kind == "adapter", model_versions.c.parent_digest == version.digest
    )
    adapter = connection.execute(adapters).first()
    if adapter is not None and connection.scalar(listed) == 1:
        raise ConflictError(
            f"{version.ref} is the base of adapter {adapter.name}/{adapter.version}",
            hint="delete the adapter first, or register its merged model",
        )


def _mlflow_version(
    client: Any, name: str, published: PublishedPackage, run_id: str | None, taken: set[int]
) -> int:
    """The number MLflow has or gives for this package, none of those `taken` in SQL."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for found in client.search_model_versions(f"name = '{name}'"):
        # Left by a registration that was interrupted before SQL knew of it.
        if found.tags.get(DIGEST_TAG) == published.digest and int(found.version) not in taken:
            return int(found.version)
    while True:
        created = client.create_model_version(
            name,
            source=_source(published),
            run_id=run_id,
            tags=version_tags(published.digest, published.manifest, published.location),
            description=model_card(published.digest, published.manifest),
            await_creation_for=0,
        )
        if int(created.version) not in taken:
            return int(created.version)
        # MLflow counts from 1 again after the model was deleted in its UI.
        _delete_in_mlflow(client, name, int(created.version))


def _source(published: PublishedPackage) -> str:
    """MLflow refuses local paths as sources; the package's identity says as much."""
    if "://" in published.location:
        return published.location
    return f"heliostat://{package_key(published.digest)}"


def _delete_in_mlflow(client: Any, name: str, version: int) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, str(version))
    except MlflowException as error:
        # Somebody else deleted it before: that is what was wanted.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


@contextmanager
def _mlflow_errors(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (HeliostatError, sa.exc.SQLAlchemyError):
        raise
    # mlflow and requests raise many types; all mean that the server did not do it.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise NotRunningError(
            f"MLflow at {settings.tracking_uri} did not do it: {reason}",
            hint="see `heliostat status` and MLflow's log",
        ) from None
