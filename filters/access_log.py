"""One JSON line for each call, written at its end."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Any

from sidecar.api import CACHED, COST, USAGE, Call, CallFilter, CallNext, End, Reply

MAX_MODEL = 200
"""Characters of a model's name: it is the caller's text."""


class AccessLog(CallFilter):
    """Who called what, how it ended, how long it took: never a key, a header or a body.

    Switch it on to know afterwards. Place it near the outside, so that calls which other filters
    refuse are logged as well. Times are milliseconds; before the first byte, `held_ms` is what a
    call waited on purpose (in a queue, before another attempt) and `overhead_ms` what the sidecar
    itself added.
    """

    sees_refused = True

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        call.on_end(partial(self._write, call))
        return call_next(call)

    def _write(self, call: Call, end: End) -> None:
        now = self.kit.clock.monotonic()
        until = call.replied_at or now
        first_byte_s = until - call.received_at
        target = call.current_target
        line: dict[str, Any] = {
            "event": "call",
            "time": self.kit.clock.wall(),
            "id": call.id,
            "team": call.team.name,
            "endpoint": call.endpoint.name,
            "method": call.method,
            "model": call.model[:MAX_MODEL] if call.model else None,
            "upstream": target.upstream.name if target is not None else None,
            "attempts": call.attempts,
            "status": call.status,
            "outcome": end.outcome,
            "bytes_in": call.bytes_in,
            "bytes_out": call.bytes_out,
            "first_byte_ms": round(first_byte_s * 1000, 3),
            "held_ms": round(call.held_s * 1000, 3),
            "overhead_ms": round((first_byte_s - call.upstream_wait_s - call.held_s) * 1000, 3),
            "total_ms": round((now - call.received_at) * 1000, 3),
        }
        error = end.error
        if error is not None:
            line["error"] = getattr(error, "code", "internal_error")
        usage = call.get(USAGE)
        if usage is not None:
            line["input_tokens"] = usage.input
            line["output_tokens"] = usage.output
            if usage.is_estimated:
                line["is_estimated"] = True
        cached = call.get(CACHED)
        if cached is not None:
            line["cached"] = cached
        cost = call.get(COST)
        if cost is not None:
            line["cost"] = format(cost.amount, "f")
            line["currency"] = cost.currency
        self.kit.access_log(line)
