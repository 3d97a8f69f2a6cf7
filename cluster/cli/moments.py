"""How verbs read moments: `30d`, `12h`, `45m`, or ISO 8601."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from cluster.errors import InputError

_DURATION = re.compile(r"([1-9][0-9]{0,5})([mhd])", re.ASCII)
_MAX_NOTICE_S = 30 * 365 * 86_400
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parse_expiry(text: str | None) -> datetime | None:
    """A moment to come: a duration counts from now, a time without zone is UTC.

    Raises:
        InputError: it is neither.
    """
    return None if text is None else _parse(text, "expiry", "expires", sign=1)


def parse_since(text: str | None) -> datetime | None:
    """A moment in the past, likewise: `12h` is twelve hours ago."""
    return None if text is None else _parse(text, "since", "since", sign=-1)


def parse_age(text: str) -> float:
    """Seconds since a moment in the past, likewise."""
    return (datetime.now(UTC) - _parse(text, "age", "older_than", sign=-1)).total_seconds()


def parse_notice(text: str | None) -> int | None:
    """Seconds until a moment to come, likewise; at least 1."""
    if text is None:
        return None
    seconds = (_parse(text, "notice", "notice", sign=1) - datetime.now(UTC)).total_seconds()
    if seconds <= 0:
        raise InputError(f"notice {text!r} is over already", hint="write 7d", param="notice")
    if seconds >= _MAX_NOTICE_S:
        raise InputError(
            f"notice {text!r} is longer than 30 years", hint="write 7d", param="notice"
        )
    return max(round(seconds), 1)


def _parse(text: str, what: str, param: str, *, sign: int) -> datetime:
    if match := _DURATION.fullmatch(text):
        return datetime.now(UTC) + sign * timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{what} {text!r} is no time",
            hint="write 30d, 12h, 45m or 2030-01-31T12:00:00Z",
            param=param,
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
