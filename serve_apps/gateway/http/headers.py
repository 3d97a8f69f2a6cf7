"""One header of a request, found without building a mapping of them all.

key = header_of(scope, b"authorization")
"""

from __future__ import annotations

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> str:
    """The first value of a header, empty where there is none; `name` is in lower case."""
    for found, value in scope["headers"]:
        if found == name:
            return str(value, "latin-1")
    return ""
