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

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster import database
from cluster.alias_mirror import AliasEdit, mirror, read_edits
from cluster.aliases import (
    ALIASES_LOCK,
    Alias,
    AliasChange,
    describe_history,
    move_alias,
    read_alias,
    read_history,
)
from cluster.database import begin_alone, model_versions
from cluster.errors import ConflictError, HeliostatError, NotFoundError, NotRunningError, first_line
from cluster.evaluations import EvaluationRecord, read_evaluations, write_evaluation
from cluster.model_package.manifest import package_key
from cluster.model_package.writer import PublishedPackage
from cluster.model_ref import CHAMPION, ModelRef, check_alias, check_name
from cluster.model_versions import ModelVersion as ModelVersion
from cluster.model_versions import (
    is_referred_to,
    read_versions,
    refuse_aliased,
    refuse_base,
    refuse_deployed,
    refuse_served,
    require_listed,
)
from cluster.security.audit import AuditLog
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import open_client
from cluster.version_mirror import forget_version, number_version, show_release

_logger = logging.getLogger(__name__)


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
            ConflictError: the package is not in storage: it was removed as garbage.
        """
        check_name(name)
        if (known := self._find_digest(name, published.digest)) is not None:
            return known
        client = open_client(self._settings)
        with _mlflow_errors(self._settings):
            taken = {version.version for version in self.list_versions(name)}
            number = number_version(
                client,
                name,
                published,
                run_id=run_id,
                taken=taken,
                parent=self._find_package(published.manifest.lineage.parent_digest),
            )
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
            # The lock under which packages are removed: this one stays, or is not listed.
            with begin_alone(self._engine, ALIASES_LOCK) as connection:
                self._require_stored(published)
                connection.execute(sa.insert(model_versions).values(row))
        except sa.exc.IntegrityError:
            return self._lost_race(client, name, number, published.digest)
        # Also where it is stopped: MLflow would show for ever what is not listed.
        except BaseException:
            # Unless the same package was registered by somebody else meanwhile.
            if self._find_digest(name, published.digest) is None:
                with contextlib.suppress(NotRunningError), _mlflow_errors(self._settings):
                    forget_version(client, name, number)
            raise
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
        known = self.versions_of(ref.name)
        there = ", ".join(
            f"{v.version} ({', '.join(v.aliases) or 'no alias'})" for v in known[-10:]
        )
        raise NotFoundError(
            f"model '{ref.name}' has no alias '{wanted}'",
            hint=f"it has versions {there}; write {ref.name}/{known[-1].version} for the newest",
        )

    def versions_of(self, name: str) -> list[ModelVersion]:
        """A model's versions, by number; at least one.

        Raises:
            NotFoundError: no such model, naming those there are.
        """
        if known := self.list_versions(name):
            return known
        names = ", ".join(sorted({v.name for v in self.list_versions()}))
        raise NotFoundError(
            f"model '{name}' does not exist",
            hint=f"there are: {names}" if names else "make one: `heliostat models import --help`",
        )

    def list_versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions, by name and number."""
        with self._engine.connect() as connection:
            return read_versions(connection, name)

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
            ConflictError: somebody else moved the alias since, or it is
                `champion` and another version is served.
            NotFoundError: no such version.
            InvalidReferenceError: MLflow has no such aliases.
        """
        check_name(alias)
        if version is not None:
            check_alias(alias)
            self._version(name, version)
        change = AliasChange(name, alias, None, version, actor, reason, database.now())
        with begin_alone(self._engine, ALIASES_LOCK) as connection:
            if version is not None:
                require_listed(connection, name, version)
            if alias == CHAMPION:
                refuse_served(connection, name, version)
            if not move_alias(connection, change, expected_revision):
                return
        self.mirror_aliases(name)

    def last_target(self, name: str, alias: str) -> ModelVersion | None:
        """Where an alias points or, if it was removed, pointed last; None if that is deleted."""
        moves = [change for change in self.history(name) if change.alias == alias]
        if not moves:
            return None
        number = moves[-1].to_version or moves[-1].from_version
        return next((v for v in self.list_versions(name) if v.version == number), None)

    def add_evaluation(self, evaluation: EvaluationRecord) -> None:
        """Keep what a package was measured to be."""
        with self._engine.begin() as connection:
            write_evaluation(connection, evaluation)

    def evaluations(self, digest: str) -> list[EvaluationRecord]:
        """What a package was measured to be: the newest of each dataset and split."""
        with self._engine.connect() as connection:
            return read_evaluations(connection, digest)

    def history(self, name: str) -> list[AliasChange]:
        """Every move of the model's aliases, oldest first.

        Raises:
            NotFoundError: no such model.
        """
        with self._engine.connect() as connection:
            changes = read_history(connection, name)
        if not changes:
            self.versions_of(name)
        return changes

    def delete_version(self, name: str, version: int) -> None:
        """Remove a version, and its package unless something else refers to it.

        Raises:
            ConflictError: an alias points to it, it is deployed, or an adapter needs it.
            NotRunningError: the MLflow server does not answer; nothing is removed.
        """
        found = self._version(name, version)
        client = open_client(self._settings)
        with begin_alone(self._engine, ALIASES_LOCK) as connection:
            refuse_aliased(connection, found)
            refuse_deployed(connection, found)
            refuse_base(connection, found)
            connection.execute(
                sa.delete(model_versions).where(
                    model_versions.c.name == name, model_versions.c.version == version
                )
            )
        # From here on it is deleted; what cannot be done now is only tidiness.
        try:
            with _mlflow_errors(self._settings):
                forget_version(client, name, version)
        except NotRunningError as error:
            _logger.warning("%s is deleted, and still shown in MLflow: %s", found.ref, error)
        try:
            with begin_alone(self._engine, ALIASES_LOCK) as connection:
                if not is_referred_to(connection, found.digest):
                    storage = Storage.open(self._settings.storage_root)
                    storage.delete_dir(package_key(found.digest))
        except NotRunningError as error:
            _logger.warning("its package stays until `heliostat gc`: %s", error.message)

    def _require_stored(self, published: PublishedPackage) -> None:
        storage = Storage.open(self._settings.storage_root)
        if not storage.exists(key := package_key(published.digest)):
            raise ConflictError(
                f"package {published.digest} is not in storage: {storage.path(key)} was removed "
                "before it was listed",
                hint="publish it again",
            )

    def _version(self, name: str, version: int) -> ModelVersion:
        for found in self.list_versions(name):
            if found.version == version:
                return found
        known = self.versions_of(name)
        numbers = ", ".join(str(v.version) for v in known[-10:])
        raise NotFoundError(
            f"model '{name}' has no version {version}", hint=f"it has versions {numbers}"
        )

    def _find_digest(self, name: str, digest: str) -> ModelVersion | None:
        return next((v for v in self.list_versions(name) if v.digest == digest), None)

    def _find_package(self, digest: str) -> ModelRef | None:
        """The first version of any name that lists a package."""
        return next((v.ref for v in self.list_versions() if v.digest == digest), None)

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
                forget_version(client, name, number)
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

    def show_release(self, name: str, version: int, text: str) -> None:
        """Say on a version's page in MLflow what became of it.

        Raises:
            NotRunningError: MLflow does not answer, or does not have the version.
        """
        client = open_client(self._settings)
        with _mlflow_errors(self._settings):
            show_release(client, name, version, text)

    def foreign_edits(self, name: str) -> list[AliasEdit]:
        """Aliases that somebody moved in MLflow since we did; they move nothing here.

        Raises:
            NotRunningError: MLflow does not answer.
        """
        client = open_client(self._settings)
        with _mlflow_errors(self._settings):
            return read_edits(client, name)


@contextlib.contextmanager
def _mlflow_errors(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (HeliostatError, sa.exc.SQLAlchemyError):
        raise
    # mlflow and requests raise many types; all mean that the server did not do it.
    except Exception as error:
        raise NotRunningError(
            f"MLflow at {settings.tracking_uri} did not do it: {first_line(error)}",
            hint="see `heliostat status` and MLflow's log",
        ) from None
