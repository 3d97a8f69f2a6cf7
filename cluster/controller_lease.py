"""A lease in SQL: of several controllers one acts, and another takes over when it is gone.

Who holds it renews it with each pass. Every write of a controller asks in its own transaction
whether the lease is still its owner's, so one that was held up for longer than the lease does
nothing more once another has taken over. Clocks of nodes must agree to within the lease, or it may
change hands too early; even then no two write. An end that lies far ahead was written before the
clock was put back, and is nobody's.

    lease = ControllerLease(engine, "release", lease_s=5)
    if lease.hold():
        with begin_alone(engine, LOCK) as connection:
            lease.require(connection)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from cluster.database import begin_alone, controller_leases
from cluster.errors import ConflictError

_LEASES_LOCK = 7233545
_FAR_AHEAD_S = 60.0


class ControllerLease:
    """One controller's claim to act."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        lease_s: float = 5.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._engine = engine
        self._name = name
        self._lease_s = lease_s
        self._clock = clock
        self._renew_at: datetime | None = None
        self.owner = secrets.token_hex(8)

    def hold(self) -> bool:
        """Take the lease, or renew it where that is due; whether it is held now."""
        moment = self._clock()
        if self._renew_at is not None and moment < self._renew_at:
            return True
        self._renew_at = None
        with begin_alone(self._engine, _LEASES_LOCK) as connection:
            row = connection.execute(self._row()).first()
            if row is not None and row.owner != self.owner and self._runs(row.expires_at, moment):
                return False
            values = {
                "owner": self.owner,
                "expires_at": _text(moment + timedelta(seconds=self._lease_s)),
            }
            # Not deleted and inserted: who waits in `require` meanwhile would find no row.
            table = sa.update(controller_leases).where(self._is_mine())
            if connection.execute(table.values(values)).rowcount == 0:
                connection.execute(sa.insert(controller_leases).values(name=self._name, **values))
        self._renew_at = moment + timedelta(seconds=self._lease_s / 3)
        return True

    def require(self, connection: Connection) -> None:
        """Raises ConflictError if another has taken over."""
        # Locked, so that nobody takes over before this transaction is done.
        row = connection.execute(self._row().with_for_update(read=True)).first()
        if row is None or row.owner != self.owner:
            self._renew_at = None
            raise ConflictError(
                f"another {self._name} controller has taken over",
                hint="nothing to do: it goes on where this one was",
            )

    def check(self) -> None:
        """As `require`, in a transaction of its own."""
        with self._engine.connect() as connection:
            self.require(connection)

    def _runs(self, expires_at: str, moment: datetime) -> bool:
        latest = moment + timedelta(seconds=self._lease_s + _FAR_AHEAD_S)
        return _text(moment) < expires_at < _text(latest)

    def _row(self) -> sa.Select[tuple[str, str]]:
        return sa.select(controller_leases.c.owner, controller_leases.c.expires_at).where(
            self._is_mine()
        )

    def _is_mine(self) -> sa.ColumnElement[bool]:
        return controller_leases.c.name == self._name


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
