"""Versions in SQL: read with their aliases, and kept as long as something needs them.

Knows nothing of packages and MLflow; `registry.py` is the face of it.

    versions = read_versions(connection, "digits")
    refuse_deployed(connection, versions[0])
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.database import aliases, deployments, model_versions
from cluster.errors import ConflictError, InputError, NotFoundError
from cluster.model_ref import ModelRef


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


def require_language_model(
    version: ModelVersion, named: str, *, hint: str, param: str | None = None
) -> None:
    """Raises InputError if what `named` refers to is of another kind."""
    if version.kind != "language_model":
        raise InputError(
            f"{named} {version.ref} is of kind '{version.kind}', expected a language model",
            hint=hint,
            param=param,
        )


def read_versions(connection: Connection, name: str | None) -> list[ModelVersion]:
    """All versions, or a model's, by name and number."""
    query = sa.select(model_versions).order_by(model_versions.c.name, model_versions.c.version)
    if name is not None:
        query = query.where(model_versions.c.name == name)
    rows = connection.execute(query).mappings().all()
    names: dict[tuple[str, int], list[str]] = {}
    for pointer in connection.execute(sa.select(aliases)).mappings():
        names.setdefault((pointer["name"], pointer["version"]), []).append(pointer["alias"])
    return [
        ModelVersion(**row, aliases=tuple(sorted(names.get((row["name"], row["version"]), ()))))
        for row in rows
    ]


def require_listed(connection: Connection, name: str, version: int) -> None:
    """Raises NotFoundError if it is gone by now."""
    query = sa.select(model_versions.c.version).where(
        model_versions.c.name == name, model_versions.c.version == version
    )
    if connection.scalar(query) is None:
        raise NotFoundError(
            f"{name}/{version} was deleted meanwhile", hint=f"see `heliostat models list {name}`"
        )


def refuse_aliased(connection: Connection, version: ModelVersion) -> None:
    """Raises ConflictError if an alias points to it."""
    query = sa.select(aliases.c.alias).where(
        aliases.c.name == version.name, aliases.c.version == version.version
    )
    if names := sorted(connection.scalars(query)):
        raise ConflictError(
            f"{version.ref} is {' and '.join(names)}",
            hint=f"move the alias first, or take it away: `heliostat models alias {version.name} "
            f"{names[0]} --remove`",
        )


def is_referred_to(connection: Connection, digest: str) -> bool:
    """Whether another version lists a package or was derived from it."""
    refers = sa.or_(model_versions.c.digest == digest, model_versions.c.parent_digest == digest)
    return bool(connection.scalar(sa.select(sa.func.count()).where(refers)))


def refuse_deployed(connection: Connection, version: ModelVersion) -> None:
    """Raises ConflictError if it is served."""
    query = sa.select(deployments.c.state).where(
        deployments.c.name == version.name,
        deployments.c.version == version.version,
        deployments.c.state != "retired",
    )
    if (state := connection.scalar(query)) is not None:
        raise ConflictError(
            f"{version.ref} is deployed ({state})",
            hint=f"take it down first: `heliostat undeploy {version.name}`",
        )


def refuse_served(connection: Connection, name: str, version: int | None) -> None:
    """Raises ConflictError if another version has a model's traffic: its champion is that one."""
    champion = connection.scalar(
        sa.select(deployments.c.version).where(
            deployments.c.name == name, deployments.c.state == "champion"
        )
    )
    if champion in (None, version):
        return
    verb = f"undeploy {name}" if version is None else f"deploy {name}/{version}"
    raise ConflictError(
        f"'{name}' is served by version {champion}, and its champion is the version that serves",
        hint=f"a release moves both: `heliostat {verb}`",
    )


def refuse_base(connection: Connection, version: ModelVersion) -> None:
    """Raises ConflictError if an adapter was trained on it, which is of no use without it."""
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
