"""Times in the headers of an answer: its `Date`, and how long it asks us to wait."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Protocol

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{0,9})?").fullmatch


class Fields(Protocol):
    """Header fields of an answer."""

    def get(self, name: str) -> str | None: ...


def unix_time(text: str | None) -> float | None:
    """Unix seconds of an HTTP date (RFC 9110, 5.6.7), which is in GMT; None for what is none."""
    try:
        moment = parsedate_to_datetime(text or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def retry_after_s(headers: Fields, wall: float) -> float | None:
    """Seconds of `retry-after-ms`, else of `retry-after` (RFC 9110, 10.2.3): a number, or a date as
    seen from `wall` (Unix seconds). None when neither says anything; never negative."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None:
        return seconds
    moment = unix_time(text)
    return None if moment is None else max(0.0, moment - wall)


def _number(text: str | None) -> float | None:
    found = _NUMBER(text.strip()) if text is not None else None
    return None if found is None else float(found.group())
