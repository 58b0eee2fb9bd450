"""Records of calls for tests."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from filters.stores.ledger import Record
from sidecar.api import Cost, Usage

NOON_S = 1_700_049_600.0
"""2023-11-15 12:00 UTC."""

PLAIN = Record(
    time_s=NOON_S,
    id="call_1",
    team="search",
    key_id="0123456789abcdef",
    endpoint="chat_completions",
    model="gpt",
    upstream="openai",
    upstream_model="gpt-4o-mini",
    status=200,
    outcome="completed",
    cached="",
    is_side=False,
    usage=Usage(10, 12),
    reported=Usage(10, 12),
    lost=None,
    cost=Cost(Decimal("0.0000123"), "USD"),
    attempts=1,
    total_s=0.25,
)


def record(**changes: Any) -> Record:
    """A plain record with some fields changed; `cost` may be a number of dollars as text."""
    if isinstance(changes.get("cost"), str):
        changes["cost"] = Cost(Decimal(changes["cost"]), "USD")
    return PLAIN._replace(**changes)


def cached(**changes: Any) -> Record:
    """One that a cache answered."""
    values = {"cached": "hit", "reported": None, "cost": "0", "attempts": 0} | changes
    return record(**values)
