"""Aliases as MLflow shows them: a mirror of SQL's, and what somebody changed in it by hand.

What was mirrored last is kept as a tag of the model, so that a mirror which lags behind after
MLflow was down is not mistaken for somebody's edit; nor is one that was interrupted, since the tag
first names both what is there and what it becomes: `{"champion": [1, 2]}`.

It gets MLflow's client, and imports nothing of it.

    edits = mirror(client, "digits", {"champion": 2}, page)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIRROR_TAG = "heliostat.aliases"


@dataclass(frozen=True)
class AliasEdit:
    """An alias that MLflow showed otherwise than it was told."""

    name: str
    alias: str
    told: int | None
    shown: int | None

    def __str__(self) -> str:
        return (
            f"alias '{self.alias}' of '{self.name}' was moved in MLflow from "
            f"{_version(self.told)} to {_version(self.shown)}"
        )


def mirror(
    client: Any, name: str, ours: Mapping[str, int], describe: Callable[[str], str]
) -> list[AliasEdit]:
    """Make MLflow show our aliases and page; returns the edits that this has undone.

    Args:
        describe: the model's description, made from the one it has.
    """
    model = client.get_registered_model(name)
    theirs = {alias: int(version) for alias, version in model.aliases.items()}
    told = _told(model)
    edits = find_edits(name, told, theirs)
    if theirs != ours:
        known = {**theirs, **{edit.alias: edit.told for edit in edits}}
        _tell(
            client,
            name,
            {alias: [known.get(alias), ours.get(alias)] for alias in known.keys() | ours.keys()},
        )
    for alias in theirs.keys() - ours.keys():
        client.delete_registered_model_alias(name, alias)
    for alias, version in ours.items():
        if theirs.get(alias) != version:
            client.set_registered_model_alias(name, alias, str(version))
    _tell(client, name, ours)
    client.update_registered_model(name, describe(model.description or ""))
    return edits


def read_edits(client: Any, name: str) -> list[AliasEdit]:
    """What was changed in MLflow since the aliases were mirrored last; changes nothing."""
    model = client.get_registered_model(name)
    theirs = {alias: int(version) for alias, version in model.aliases.items()}
    return find_edits(name, _told(model), theirs)


def find_edits(
    name: str, told: Mapping[str, Sequence[int | None]] | None, shown: Mapping[str, int]
) -> list[AliasEdit]:
    """Differences between what MLflow was told and what it shows.

    Args:
        told: by alias, the versions that it may show, the one it showed before first; None is no
            version.
    """
    if told is None:
        return []
    return [
        AliasEdit(name, alias, told.get(alias, [None])[0], shown.get(alias))
        for alias in sorted(told.keys() | shown.keys())
        if shown.get(alias) not in told.get(alias, [None])
    ]


def _tell(client: Any, name: str, aliases: Mapping[str, int | list[int | None]]) -> None:
    tag = json.dumps(dict(aliases), sort_keys=True)
    client.set_registered_model_tag(name, MIRROR_TAG, tag)


def _told(model: Any) -> dict[str, list[int | None]] | None:
    """None if the aliases were never mirrored, or the tag was overwritten."""
    try:
        values = json.loads(model.tags[MIRROR_TAG])
        return {
            alias: [version if version is None else int(version) for version in versions]
            if isinstance(versions, list)
            else [int(versions)]
            for alias, versions in values.items()
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _version(version: int | None) -> str:
    return "none" if version is None else f"version {version}"
