"""What every call used and cost, written down to be asked for later."""

from __future__ import annotations

from collections.abc import Awaitable
from decimal import Decimal
from functools import partial

from pydantic import PositiveInt

from filters.stores.ledger import Ledger as Book
from filters.stores.ledger import Record, Where, open_ledger, place_of
from sidecar.api import (
    CACHED,
    COST,
    LOST_USAGE,
    REPORTED,
    SIDE_CALLS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Cost,
    End,
    FilterConfig,
    Kit,
    Reply,
)

NOTHING = Decimal(0)
MAX_MODEL = 200
"""Characters of a model's name: it is the caller's text."""


class Ledger(CallFilter):
    """Keeps a record of each call's tokens and cost, for `sidecar usage`.

    Switch it on to know afterwards who used what, and what it cost. Place it near the outside,
    before `cost`, `token_counter` and `cache`, so that it sees what they found. A call that no
    upstream was asked for, and that no cache answered, has no record. No prompt, answer or key
    is kept.
    """

    class Config(FilterConfig):
        where: Where = "auto"
        """`disk`: a record for each call in `data_dir`; `redis`: sums for each minute in the
        shared store; `auto`: there if there is one, else on disk if there is a `data_dir`, else
        nowhere; `off`: nowhere."""
        keep_days: PositiveInt = 90
        """Older records are deleted."""

    reads = frozenset({USAGE})

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._place = place_of(config.where, kit.store, kit.data_dir)
        self.is_idle = self._place is None
        self._book: Book
        self._has_joined = False

    async def start(self) -> None:
        if self._place is not None:
            self._book = open_ledger(self.kit, self._place)
            self._book.join(self.config.keep_days)
            self._has_joined = True

    async def stop(self) -> None:
        if self._has_joined:
            self._has_joined = False
            self._book.leave(self.config.keep_days)

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if call.endpoint.has_model:
            call.on_end(partial(self._enter, call))
        return call_next(call)

    def _enter(self, call: Call, end: End) -> None:
        cached = call.get(CACHED, "")
        has_side_calls = SIDE_CALLS in call
        if not (call.attempts or cached or has_side_calls):
            return
        kit, usage, cost = self.kit, call.get(USAGE), call.get(COST)
        if cached:
            reported = None
        elif usage is not None and usage.is_estimated:
            reported = call.get(REPORTED)
        else:
            reported = usage
        target = call.target or (call.targets[0] if call.targets else None)
        model = call.model or ""
        if len(model) > MAX_MODEL:
            model = model[:MAX_MODEL]
        record = Record(
            kit.clock.wall(),
            call.id,
            kit.team,
            call.key_id,
            call.endpoint.name,
            model,
            target.upstream.name if target is not None else "",
            (target.model if target is not None else None) or model,
            call.status,
            end.outcome,
            cached,
            False,
            usage,
            reported,
            call.get(LOST_USAGE),
            cost,
            call.attempts,
            kit.clock.monotonic() - call.received_at,
        )
        self._book.enter(record)
        if has_side_calls:
            self._enter_side_calls(call, record)

    def _enter_side_calls(self, call: Call, record: Record) -> None:
        """Theirs is a part of the call's cost, and told there."""
        paid = None if record.cost is None else Cost(NOTHING, record.cost.currency)
        for side in call[SIDE_CALLS]:
            model = side.target.model or ""
            self._book.enter(
                record._replace(
                    endpoint=side.endpoint,
                    model=model,
                    upstream=side.target.upstream.name,
                    upstream_model=model,
                    cached="",
                    is_side=True,
                    usage=side.usage,
                    reported=None if side.usage.is_estimated else side.usage,
                    lost=None,
                    cost=paid,
                )
            )
