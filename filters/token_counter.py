"""What a call used, as its provider reports it."""

from __future__ import annotations

from sidecar.api import USAGE, Call, CallFilter, CallNext, Event, Reply


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
            read = call.dialect.usage

            def count(event: Event) -> None:
                usage = read(event, call.get(USAGE))
                if usage is not None:
                    call[USAGE] = usage

            reply.body.tap_events(count)
        return reply
