"""What a call used, as its provider reports it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sidecar.api import USAGE, Call, CallFilter, CallNext, Event, Reply, Usage


class TokenCounter(CallFilter):
    """Reads `usage` from replies and streams and leaves it on the call for other filters.

    Switch it on for token counts in log and metrics. Place it inside of those who read them at the
    end of the call. It changes nothing: a stream whose provider reports no usage has none.
    """

    gives = frozenset({USAGE})
    taps_events = True

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        if reply.status == 200 and call.endpoint.has_model:
            read = partial(_count, call, call.dialect.usage)
            reply.body.tap_events(read, containing=b'"usage"')
        return reply


def _count(call: Call, read: Callable[[Event, Usage | None], Usage | None], event: Event) -> None:
    before = call.get(USAGE)
    usage = read(event, before)
    if usage is not before and usage is not None:
        call[USAGE] = usage
