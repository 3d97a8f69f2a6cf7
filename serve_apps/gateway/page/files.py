"""The files of the page: what lies in `static/`, read once, and the paths that it is served at.

paths = {file.path for file in PAGE_FILES}
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_STATIC = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """One file in memory."""

    path: str
    """Where it is served."""
    body: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'


def _read_files() -> tuple[PageFile, ...]:
    return tuple(
        PageFile(
            "/" if path.name == "index.html" else f"/static/{path.name}",
            path.read_bytes(),
            _MEDIA_TYPES[path.suffix],
        )
        for path in sorted(_STATIC.iterdir())
    )


PAGE_FILES = _read_files()
PAGE_PATHS = frozenset(file.path for file in PAGE_FILES)
"""Every path that is the page's, each of them exact."""
