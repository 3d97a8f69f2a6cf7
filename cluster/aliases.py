"""Aliases in SQL: compare-and-set on a revision, and a history that is only ever added to.

Knows nothing of packages and MLflow; `registry.py` is the face of it.

    with engine.begin() as connection:
        move_alias(connection, change, expected_revision=3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cluster.database import alias_history, aliases
from cluster.errors import ConflictError

ALIASES_LOCK = 7233543
"""For `begin_alone`: whoever moves an alias, or removes what one may point to."""

_HISTORY_TITLE = "## Aliases: who moved them, when and why"
_MAX_PAGE_CHARACTERS = 4500
"""MLflow stores 5000."""


@dataclass(frozen=True)
class Alias:
    """Where an alias points; `revision` grows with every move."""

    name: str
    alias: str
    version: int
    revision: int


@dataclass(frozen=True)
class AliasChange:
    """One line of the history."""

    name: str
    alias: str
    from_version: int | None
    to_version: int | None
    actor: str
    reason: str
    at: str


def read_alias(connection: Connection, name: str, alias: str) -> Alias | None:
    """Where the alias points now."""
    query = sa.select(aliases).where(aliases.c.name == name, aliases.c.alias == alias)
    row = connection.execute(query).mappings().first()
    return Alias(**row) if row is not None else None


def read_history(connection: Connection, name: str) -> list[AliasChange]:
    """Every move of a model's aliases, oldest first."""
    query = sa.select(alias_history).where(alias_history.c.name == name)
    rows = connection.execute(query.order_by(alias_history.c.id)).mappings()
    return [AliasChange(**{k: v for k, v in row.items() if k != "id"}) for row in rows]


def describe_history(changes: Sequence[AliasChange], before: str = "") -> str:
    """The history as Markdown, newest move first, for a page that people read.

    Args:
        before: the page as it is; what stands above its history stays.
    """
    own_words = before.partition(_HISTORY_TITLE)[0].rstrip()
    lines = [
        _HISTORY_TITLE,
        "",
        "| when | alias | from | to | who | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    length = len(own_words) + sum(len(line) + 1 for line in lines)
    for change in reversed(changes):
        line = _as_row(change)
        length += len(line) + 1
        if length > _MAX_PAGE_CHARACTERS:
            break
        lines.append(line)
    return "\n".join([own_words, "", *lines] if own_words else lines)


def _as_row(change: AliasChange) -> str:
    cells = (
        change.at[:19] + "Z",
        change.alias,
        change.from_version,
        change.to_version,
        change.actor,
        change.reason[:200],
    )
    shown = (("–" if cell is None else str(cell)) for cell in cells)
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in shown)} |"


def move_alias(connection: Connection, change: AliasChange, expected_revision: int | None) -> bool:
    """Make the change and write it down; False if the alias is there already.

    Args:
        change: its `from_version` is filled in here.
        expected_revision: the revision the decision was made on, 0 where the alias did not exist;
            None takes the one found now.

    Raises:
        ConflictError: somebody else moved the alias since.
    """
    before = read_alias(connection, change.name, change.alias)
    revision = before.revision if before else 0
    if expected_revision is None:
        if (before.version if before else None) == change.to_version:
            return False
    elif expected_revision != revision:
        raise _moved(change)
    _compare_and_set(connection, change, revision)
    done = replace(change, from_version=before.version if before else None)
    connection.execute(sa.insert(alias_history).values(asdict(done)))
    return True


def _compare_and_set(connection: Connection, change: AliasChange, revision: int) -> None:
    if revision == 0:
        _insert(connection, change)
        return
    # The condition is what makes two writers safe: the second finds another revision.
    same = sa.and_(
        aliases.c.name == change.name,
        aliases.c.alias == change.alias,
        aliases.c.revision == revision,
    )
    statement: Any = sa.delete(aliases).where(same)
    if change.to_version is not None:
        statement = (
            sa.update(aliases).where(same).values(version=change.to_version, revision=revision + 1)
        )
    if connection.execute(statement).rowcount != 1:
        raise _moved(change)


def _insert(connection: Connection, change: AliasChange) -> None:
    if change.to_version is None:
        return
    # After a removal the revision goes on from the history, so an old one never fits again.
    moves = sa.select(sa.func.count() + 1).where(
        alias_history.c.name == change.name, alias_history.c.alias == change.alias
    )
    row = {
        "name": change.name,
        "alias": change.alias,
        "version": change.to_version,
        "revision": connection.scalar(moves),
    }
    try:
        connection.execute(sa.insert(aliases).values(row))
    except sa.exc.IntegrityError:
        raise _moved(change) from None


def _moved(change: AliasChange) -> ConflictError:
    return ConflictError(
        f"alias '{change.alias}' of '{change.name}' was moved by somebody else meanwhile",
        hint=f"look at `heliostat models history {change.name}` and decide again",
    )
