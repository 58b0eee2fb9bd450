"""What calls used and cost, written down to be asked for later."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from functools import partial

from pydantic import PositiveInt

from filters.stores.ledger import Kind, Where, open_ledger, place_of
from filters.stores.ledger import Ledger as Book
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
    End,
    FilterConfig,
    Ground,
    Kit,
    Reply,
    SideCall,
)

MAX_MODEL = 200
"""Characters of a model's name: it is the caller's text."""


class Ledger(CallFilter):
    """Keeps records of the tokens and the cost of calls, for `sidecar usage`.

    Switch it on to know afterwards who used what, and what it cost. Place it near the outside,
    before `cost`, `token_counter` and `cache`, so that it sees what they found. A call that no
    upstream was asked for, and that no cache answered, is in no record. No prompt, answer or
    key is kept.
    """

    class Config(FilterConfig):
        where: Where = "auto"
        """`disk`: sums for each tenth of a second in `data_dir`, after an hour for each minute;
        `redis`: sums for each minute in the shared store; `auto`: there if there is one, else on
        disk if there is a `data_dir`, else nowhere; `off`: nowhere."""
        keep_days: PositiveInt = 90
        """Older records are deleted."""

        def lacks(self, ground: Ground) -> Iterable[tuple[tuple[str | int, ...], str]]:
            if self.where == "disk" and not ground.has_data_dir:
                yield ("where",), "disk keeps records in `data_dir`: set that"
            if self.where == "redis" and not ground.has_store:
                yield ("where",), "redis keeps records in the `store`: set that"

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
        cached, sides = call.get(CACHED, ""), call.get(SIDE_CALLS)
        if not (call.attempts or cached or sides is not None):
            return
        kit, usage, cost = self.kit, call.get(USAGE), call.get(COST)
        is_estimated = usage is not None and usage.is_estimated
        own_report = call.get(REPORTED) if is_estimated else usage
        reported = None if cached else own_report
        model = call.model or ""
        if len(model) > MAX_MODEL:
            model = model[:MAX_MODEL]
        target = call.current_target
        kind = Kind(
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
            is_estimated,
            cost.currency if cost is not None else None,
        )
        total_s = kit.clock.monotonic() - call.received_at
        lost = call.get(LOST_USAGE)
        self._book.enter(kind, usage, reported, lost, cost, call.attempts, total_s)
        if sides is not None:
            for side in sides:
                self._enter_side_call(kind, side)

    def _enter_side_call(self, kind: Kind, side: SideCall) -> None:
        """What it cost is a part of the call's cost, and told there."""
        usage, model = side.usage, side.target.model or ""
        of_side = kind._replace(
            endpoint=side.endpoint,
            model=model,
            upstream=side.target.upstream.name,
            upstream_model=model,
            cached="",
            is_side=True,
            is_estimated=usage.is_estimated,
        )
        reported = None if usage.is_estimated else usage
        self._book.enter(of_side, usage, reported, None, None, 0, 0.0)
