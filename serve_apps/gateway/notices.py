"""What clients are told of a version that will be taken away, and until when it answers.

Headers `Deprecation` (RFC 9745) and `Sunset` (RFC 8594); afterwards 410.

    notice = Notice(given_at_s=1767225600, ends_at_s=1767830400)
    for name, value in notice.headers().items():
        ...
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from email.utils import formatdate


@dataclass(frozen=True)
class Notice:
    """From when on a version is deprecated, and when it ends; in seconds since 1970."""

    given_at_s: float
    ends_at_s: float

    @classmethod
    def read(cls, given_at: str, ends_at: str) -> Notice:
        """From moments as the tables have them."""
        return cls(_seconds(given_at), _seconds(ends_at))

    @property
    def ends_at(self) -> str:
        """As HTTP writes it."""
        return formatdate(self.ends_at_s, usegmt=True)

    def headers(self) -> dict[str, str]:
        """In lower case, as HTTP/2 and gRPC have them."""
        return {"deprecation": f"@{int(self.given_at_s)}", "sunset": self.ends_at}


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
