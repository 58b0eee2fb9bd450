"""A call filter that tries again, so that signing can be watched from one attempt to the next."""

from __future__ import annotations

from sidecar.api import Call, CallFilter, CallNext, Reply


class RetriesOnce(CallFilter):
    """Tries a call that was answered 503 once more; one whose body streamed cannot be."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        reply = await call_next(call)
        if reply.status != 503 or call.upload is not None:
            return reply
        reply.discard()
        return await call_next(call)
