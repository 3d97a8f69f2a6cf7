"""`ModelRef`: how people name a model, `NAME`, `NAME@ALIAS` or `NAME/VERSION`.

MLflow's `models:/NAME@ALIAS` and `models:/NAME/VERSION` are accepted too. A bare name means its
`champion`.

    ModelRef.parse("digits@champion")   # name='digits', alias='champion'
    ModelRef.parse("digits/3")          # name='digits', version=3
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import InvalidReferenceError

CHAMPION = "champion"
CANDIDATE = "candidate"

# ASCII only: a look-alike letter or a path is not a name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
# What MLflow, which shows the aliases, refuses or keeps for itself.
_ALIAS = re.compile(r"(?!(latest|v[0-9]+)\Z)[A-Za-z0-9_-]+", re.ASCII | re.IGNORECASE)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


@dataclass(frozen=True)
class ModelRef:
    """A model by name and either an alias or a version number; both None mean the champion."""

    name: str
    alias: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Raises InvalidReferenceError for anything that is not strictly a reference."""
        body = text.removeprefix("models:/")
        name, at, alias = body.partition("@")
        if at:
            check_name(name, text)
            check_name(alias, text)
            return cls(name, alias=alias)
        name, slash, version = body.partition("/")
        check_name(name, text)
        if not slash:
            return cls(name)
        if not _VERSION.fullmatch(version):
            raise InvalidReferenceError(
                f"model reference {text!r}: version {version!r} is not a positive number",
                hint="write NAME, NAME@ALIAS or NAME/VERSION",
            )
        return cls(name, version=int(version))

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}/{self.version}"
        return f"{self.name}@{self.alias or CHAMPION}"


def check_name(name: str, shown: str | None = None) -> str:
    """Return `name` if it may name a model or an alias, else raise InvalidReferenceError."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidReferenceError(
            f"model reference {(shown or name)!r} is not valid",
            hint="names are 1-128 of A-Z a-z 0-9 . _ - and start with a letter or digit; "
            "write NAME, NAME@ALIAS or NAME/VERSION",
        )
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if a version may be given it, else raise InvalidReferenceError."""
    if not _ALIAS.fullmatch(check_name(alias)):
        raise InvalidReferenceError(
            f"alias {alias!r} is not valid",
            hint="aliases have A-Z a-z 0-9 _ - and are neither 'latest' nor like 'v1': those mean "
            "something else in MLflow",
        )
    return alias
