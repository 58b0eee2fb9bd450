"""Records of calls for tests."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from filters.stores.ledger import Kind, Record
from sidecar.api import Cost, Usage

NOON_S = 1_700_049_600.0
"""2023-11-15 12:00 UTC."""

USED = Usage(10, 12)

KIND: Kind = (
    *("search", "0123456789abcdef", "chat_completions", "gpt", "openai", "gpt-4o-mini"),
    *(200, "completed", "", False, False, "USD"),
)
_KIND_FIELDS = Record._fields[1 : 1 + len(KIND)]


def kind(**changes: Any) -> Kind:
    """A plain one with some fields changed."""
    fields = dict(zip(_KIND_FIELDS, KIND, strict=True))
    assert fields.keys() >= changes.keys()
    return tuple((fields | changes).values())  # type: ignore[return-value]


def record(
    *,
    time_s: float = NOON_S,
    calls: int = 1,
    usage: Usage | None = USED,
    reported: Usage | None = USED,
    lost: Usage | None = None,
    cost: str | Cost | None = "0.0000123",
    attempts: int = 1,
    total_s: float = 0.25,
    **changes: Any,
) -> Record:
    """What became of `calls` plain calls with some fields changed; `cost` as text is in dollars."""
    paid = Cost(Decimal(cost), "USD") if isinstance(cost, str) else cost
    used, reported, lost = usage or Usage(), reported or Usage(), lost or Usage()
    changes["currency"] = None if paid is None else paid.currency
    changes["is_estimated"] = used.is_estimated
    return Record(
        time_s,
        *kind(**changes),
        calls=calls,
        input_tokens=used.input,
        output_tokens=used.output,
        cached_tokens=used.cached,
        cache_write_tokens=used.cache_write,
        cache_write_1h_tokens=used.cache_write_1h,
        reasoning_tokens=used.reasoning,
        reported_input_tokens=reported.input,
        reported_output_tokens=reported.output,
        lost_input_tokens=lost.input,
        lost_output_tokens=lost.output,
        attempts=attempts,
        total_s=total_s,
        cost=Decimal(0) if paid is None else paid.amount,
    )


def cached(**changes: Any) -> Record:
    """Calls that a cache answered."""
    values = {"cached": "hit", "reported": None, "cost": "0", "attempts": 0} | changes
    return record(**values)
