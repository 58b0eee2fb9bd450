"""When a provider's window opens again, as its rate-limit headers say.

Every provider writes times in its own way: OpenAI as Go durations (`6m0s`, `12ms`), Azure as whole
seconds, Anthropic as RFC 3339 dates. Only a window that is used up asks to wait: the headers of the
others stand on every answer. `Retry-After` is `http_time`'s.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

from filters.algo.http_time import Fields

OPENAI_KINDS = ("requests", "tokens", "project-tokens")
ANTHROPIC_KINDS = (
    *("requests", "tokens", "input-tokens", "output-tokens"),
    *("priority-input-tokens", "priority-output-tokens"),
)

_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_STEP = r"([0-9]{1,9}(?:\.[0-9]{0,9})?)(h|ms|m|s|us|µs|ns)"
_STEPS = re.compile(_STEP)
_DURATION = re.compile(rf"(?:{_STEP})+").fullmatch
_SECONDS = re.compile(r"[0-9]{1,8}(?:\.[0-9]{0,9})?").fullmatch
_ZERO = re.compile(r"0+(?:\.0*)?").fullmatch


def duration_s(text: str | None) -> float | None:
    """Seconds of a Go duration such as `1h2m3s`, `12ms` or `46.2s`, or of a plain number of
    seconds; None for what is neither."""
    text = (text or "").strip()
    if _SECONDS(text):
        return float(text)
    if not _DURATION(text):
        return None
    return sum(float(number) * _UNIT_S[unit] for number, unit in _STEPS.findall(text))


def rfc3339_time(text: str | None) -> float | None:
    """Unix seconds of an RFC 3339 date, in UTC unless it says otherwise; None for what is none."""
    try:
        moment = datetime.fromisoformat((text or "").strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def reset_wait_s(headers: Fields, wall: float) -> float | None:
    """Seconds until every window is open that these headers call used up; None when there is none.

    `wall` is the time in Unix seconds by the clock of whoever wrote the dates. A remainder of -1,
    and a reset of 0, which Azure sends where it has nothing to say, say nothing. Sources: OpenAI
    API, "Rate limits"; Azure OpenAI, "Rate limiting headers"; Anthropic API, "Rate limits".
    """
    waits = []
    for kind in OPENAI_KINDS:
        if _is_zero(headers.get(f"x-ratelimit-remaining-{kind}")):
            waits.append(duration_s(headers.get(f"x-ratelimit-reset-{kind}")))
    for kind in ANTHROPIC_KINDS:
        prefix = f"anthropic-ratelimit-{kind}"
        if kind.startswith("priority"):
            prefix = f"anthropic-{kind}"
        if _is_zero(headers.get(f"{prefix}-remaining")):
            moment = rfc3339_time(headers.get(f"{prefix}-reset"))
            waits.append(None if moment is None else moment - wall)
    return max((each for each in waits if each is not None and each > 0.0), default=None)


def _is_zero(text: str | None) -> bool:
    return text is not None and _ZERO(text.strip()) is not None
