"""API keys: who may call the gateway, and what for.

A key is shown once, when it is made; the database holds its SHA-256, which is enough for a secret
of 256 random bits. Knows nothing of HTTP.

    keys = ApiKeys(open_database(settings.database))
    created = keys.create("search-team", ["infer"])
    identity = keys.verify(created.key)          # Identity(key_id=…, tenant='search-team', …)
    identity.require("admin")                    # raises PermissionDeniedError
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.database import api_keys, audit_log, now, tenants
from cluster.errors import (
    AuthenticationError,
    ConflictError,
    InputError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
)
from cluster.model_ref import check_name
from cluster.security.limits import UNLIMITED, TenantLimits

KEY_PREFIX = "hst_"
TENANT_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", re.ASCII)
SCOPES = ("infer", "models:read", "usage:read", "admin")

_SECRET_BYTES = 32
_MIN_KEY_CHARACTERS = 26  # the prefix and 128 bits in base64
_LIMITS = tuple(TenantLimits.__dataclass_fields__)
_MAX_LIMIT = 10**15


@dataclass(frozen=True)
class Identity:
    """Who a verified key stands for."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    """Names of the models it is for; None is for all."""
    limits: TenantLimits = UNLIMITED
    """Its tenant's."""

    def may_use(self, model: str) -> bool:
        """Whether the key is for the model of this name."""
        return self.models is None or model in self.models

    def require(self, scope: str) -> None:
        """Raises PermissionDeniedError unless the key carries `scope`."""
        if scope not in self.scopes:
            raise PermissionDeniedError(
                f"this key lacks the scope '{scope}', it has: {', '.join(sorted(self.scopes))}",
                hint=f"make one with `heliostat keys create --tenant {self.tenant} "
                f"--scope {scope}`",
            )


@dataclass(frozen=True)
class CreatedKey:
    """A new key. `key` exists nowhere else."""

    id: str
    key: str


@dataclass(frozen=True)
class KeyRecord:
    """What the database knows about a key; times are ISO 8601 in UTC."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    models: tuple[str, ...] | None = None
    """Names of the models it is for; None is for all."""

    @property
    def state(self) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if _is_past(self.expires_at) else "active"


@dataclass(frozen=True)
class Tenant:
    """What the database knows about a tenant."""

    name: str
    created_at: str
    limits: TenantLimits


class ApiKeys:
    """The keys in one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self,
        tenant: str,
        scopes: Sequence[str],
        expires_at: datetime | None = None,
        key: str | None = None,
        *,
        models: Sequence[str] | None = None,
        actor: str = "cli",
    ) -> CreatedKey:
        """Make a key for `tenant`, which is added if it is new; `key` brings an existing secret.

        Args:
            models: names of the only models it is for; they need not be there yet.

        Raises:
            InputError: an unknown scope, a bad tenant or model name, a time in the past or a weak
                key.
            ConflictError: this very key is already stored.
        """
        scopes = _check_scopes(scopes)
        names = _check_models(models)
        expires = _check_expiry(expires_at)
        secret = _check_secret(key) if key else KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        created = CreatedKey(id=f"key_{secrets.token_hex(6)}", key=secret)
        row = {
            "id": created.id,
            "tenant": tenant,
            "key_hash": _hash(secret),
            "scopes": list(scopes),
            "created_at": now(),
            "expires_at": expires,
            "models": names,
        }
        try:
            with self._engine.begin() as connection:
                _ensure_tenant(connection, tenant, actor)
                connection.execute(sa.insert(api_keys).values(row))
                detail = {
                    "tenant": tenant,
                    "scopes": list(scopes),
                    "expires_at": expires,
                    "models": names,
                }
                _audit(connection, actor, "key.create", created.id, detail)
        except sa.exc.IntegrityError:
            raise ConflictError(
                "this key is already stored", hint="see `heliostat keys list`"
            ) from None
        return created

    def verify(self, key: str) -> Identity:
        """Return who `key` stands for.

        Raises:
            AuthenticationError: it is missing, unknown, expired or revoked.
        """
        if not key:
            raise AuthenticationError(
                "no API key was sent", hint="send the header 'Authorization: Bearer KEY'"
            )
        digest = _hash(key)
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(api_keys, *(tenants.c[name] for name in _LIMITS))
                .join(tenants, tenants.c.name == api_keys.c.tenant)
                .where(api_keys.c.key_hash == digest)
            ).one_or_none()
        # The index compares hashes, whose prefixes tell nothing of the key; this closes the rest.
        if row is None or not hmac.compare_digest(row.key_hash, digest):
            raise AuthenticationError(
                "this API key is not known here",
                hint="make one with `heliostat keys create --tenant NAME`",
            )
        record = _record(row)
        if record.state != "active":
            raise AuthenticationError(
                f"API key {record.id} is {record.state}",
                hint=f"make another with `heliostat keys create --tenant {record.tenant}`",
            )
        models = None if record.models is None else frozenset(record.models)
        scopes = frozenset(record.scopes)
        return Identity(record.id, record.tenant, scopes, models, read_limits(row))

    def list(self, tenant: str | None = None) -> Sequence[KeyRecord]:
        """Every key, oldest first; revoked and expired ones too."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]

    def revoke(self, key_id: str, *, actor: str = "cli") -> None:
        """End a key for ever; revoking it again changes nothing.

        Raises:
            NotFoundError: there is no such key.
        """
        with self._engine.begin() as connection:
            row = connection.execute(
                sa.select(api_keys).where(api_keys.c.id == key_id)
            ).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"there is no API key '{key_id}'", hint="see `heliostat keys list`"
                )
            if row.revoked_at is not None:
                return
            connection.execute(
                sa.update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=now())
            )
            _audit(connection, actor, "key.revoke", key_id, {"tenant": row.tenant})

    def set_tenant(
        self, name: str, limits: Mapping[str, int | None] | None = None, *, actor: str = "cli"
    ) -> Tenant:
        """Add a tenant unless it is there, and change its limits.

        Args:
            limits: new values by the names of TenantLimits' fields, None for without limit; what is
                not named stays as it is.

        Raises:
            InputError: a bad name, or a limit that is not positive.
        """
        changes = {name: _check_limit(name, value) for name, value in (limits or {}).items()}
        with self._engine.begin() as connection:
            _ensure_tenant(connection, name, actor)
            this = tenants.c.name == name
            if changes:
                connection.execute(sa.update(tenants).where(this).values(changes))
                _audit(connection, actor, "tenant.limits", name, dict(changes))
            return _tenant(connection.execute(sa.select(tenants).where(this)).one())

    def list_tenants(self) -> Sequence[Tenant]:
        """Every tenant, by name."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(tenants).order_by(tenants.c.name))
            return [_tenant(row) for row in rows]


def read_limits(row: Any) -> TenantLimits:
    """The limits in a row with the columns of `tenants`."""
    return TenantLimits(**{name: getattr(row, name) for name in _LIMITS})


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _record(row: Any) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        tenant=row.tenant,
        scopes=tuple(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        models=None if row.models is None else tuple(row.models),
    )


def _tenant(row: Any) -> Tenant:
    return Tenant(row.name, row.created_at, read_limits(row))


def _is_past(expires_at: str | None) -> bool:
    return expires_at is not None and datetime.fromisoformat(expires_at) <= datetime.now(UTC)


def _check_scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        found = f"unknown scope '{unknown[0]}'" if unknown else "a key needs at least one scope"
        raise InputError(found, hint=f"scopes are: {', '.join(SCOPES)}", param="scopes")
    return tuple(dict.fromkeys(scopes))


def _check_models(models: Sequence[str] | None) -> list[str] | None:
    if models is None:
        return None
    if not models:
        raise InputError(
            "a key for no model at all is of no use",
            hint="name a model, or leave it out for all",
            param="models",
        )
    try:
        return sorted({check_name(name) for name in models})
    except InvalidReferenceError as error:
        raise InputError(
            error.message, hint="a key is for names, with all their versions", param="models"
        ) from None


def _check_limit(name: str, value: int | None) -> int | None:
    if name not in _LIMITS:
        raise InputError(f"there is no limit '{name}'", hint=f"limits are: {', '.join(_LIMITS)}")
    if value is not None and not 0 < value <= _MAX_LIMIT:
        raise InputError(
            f"{name} is {value}, expected 1 to {_MAX_LIMIT}",
            hint="revoke a tenant's keys to shut it out",
            param=name,
        )
    return value


def _check_expiry(expires_at: datetime | None) -> str | None:
    if expires_at is None:
        return None
    text = expires_at.astimezone(UTC).isoformat(timespec="milliseconds")
    if _is_past(text):
        raise InputError(
            f"expiry {text} has passed", hint="name a time to come", param="expires_at"
        )
    return text


def _check_secret(key: str) -> str:
    if len(key) < _MIN_KEY_CHARACTERS:
        raise InputError(
            f"a key of {len(key)} characters can be guessed, expected at least "
            f"{_MIN_KEY_CHARACTERS}",
            hint="leave it out and one is made",
            param="key",
        )
    return key


def _ensure_tenant(connection: Connection, name: str, actor: str) -> None:
    if not TENANT_NAME.fullmatch(name):
        raise InputError(
            f"tenant name {name!r} is not valid",
            hint="1-128 of A-Z a-z 0-9 . _ - beginning with a letter or digit",
            param="tenant",
        )
    known = connection.execute(sa.select(tenants.c.name).where(tenants.c.name == name)).first()
    if known is None:
        connection.execute(sa.insert(tenants).values(name=name, created_at=now()))
        _audit(connection, actor, "tenant.create", name, {})


def _audit(
    connection: Connection, actor: str, action: str, target: str, detail: dict[str, Any]
) -> None:
    connection.execute(
        sa.insert(audit_log).values(
            at=now(), actor=actor, action=action, target=target, detail=detail
        )
    )
