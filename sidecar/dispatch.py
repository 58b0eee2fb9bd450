"""The hinge of the path: a call comes in, an attempt goes out.

Every attempt gets a pristine copy of head and body, whatever earlier attempts or filters did to
theirs, and ends exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

import orjson
from multidict import CIMultiDict

from sidecar.call import Attempt, Call, End, Outcome, Target, end_of
from sidecar.dialects.endpoint import MODELS, PASS_THROUGH
from sidecar.errors import CallError, Phase, Rejected, Retry, UpstreamError
from sidecar.filter import AttemptNext
from sidecar.metrics import Counter
from sidecar.reply import Reply
from sidecar.tasks import Tasks
from sidecar.team import Models
from sidecar.transport.connection import HOP_BY_HOP
from sidecar.transport.upstream import LiveUpstream

NEVER_SENT = HOP_BY_HOP | {
    "host",  # the upstream's own is written
    "content-length",  # written with the body
    "expect",  # answered by the edge
    "accept-encoding",  # depends on whether filters look at the answer
    # The client's credentials are for us.
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "cookie",
}


class Dispatch:
    """Turns calls into attempts for one chain."""

    def __init__(
        self,
        *,
        upstreams: Mapping[str, LiveUpstream],
        models: Models,
        tasks: Tasks,
        taps_events: bool,
        dropped_taps: Counter,
    ) -> None:
        self._upstreams = upstreams
        self._models = models
        self._tasks = tasks
        self._taps_events = taps_events
        self._dropped_taps = dropped_taps
        self.attempt_chain: AttemptNext = self.send  # set once the filters are linked

    async def __call__(self, call: Call) -> Reply:
        """The end of the call chain: one attempt at `call.target`, or at the first target."""
        target = call.target or (call.targets[0] if call.targets else None)
        if target is None:
            return self._answer_here(call)
        attempt = self._attempt(call, target)
        try:
            reply = await self.attempt_chain(attempt)
        except BaseException as error:
            self._count_wait(attempt)
            attempt.finish(end_of(error, call), self._tasks)
            raise
        self._count_wait(attempt)
        body, status = reply.body, reply.status

        def body_ended(outcome: Outcome, error: CallError | None) -> None:
            if body.dropped_taps:
                self._dropped_taps.inc(body.dropped_taps)
            attempt.finish(End(outcome, status, error), self._tasks)

        body.on_end(body_ended)
        return reply

    async def send(self, attempt: Attempt) -> Reply:
        """The end of the attempt chain: the transport."""
        upstream = self._upstreams[attempt.upstream.name]
        reply = await upstream.send(attempt)
        if upstream.waits_for_event and reply.status == 200 and reply.body.is_stream:
            await _refuse_error_event(attempt, reply)
        attempt.first_byte_at = reply.first_byte_at
        return reply

    def _attempt(self, call: Call, target: Target) -> Attempt:
        upstream = self._upstreams[target.upstream.name]
        if upstream.dialect is not call.dialect:
            known = ", ".join(each.path for each in upstream.dialect.endpoints)
            message = f'"{call.model}" speaks the {upstream.dialect.name} dialect: call {known}'
            raise Rejected(400, "wrong_dialect", message)
        headers = CIMultiDict(
            [item for item in call.headers.items() if item[0].lower() not in NEVER_SENT]
        )
        if "connection" in call.headers:
            for value in call.headers.getall("connection"):
                for name in value.split(","):
                    headers.popall(name.strip(), None)
        if self._taps_events:
            headers["accept-encoding"] = "identity"
        elif (accepted := call.headers.get("accept-encoding")) is not None:
            headers["accept-encoding"] = accepted
        if call.upstream_headers:
            headers.update(call.upstream_headers)
        if upstream.extra_headers:
            headers.update(upstream.extra_headers)
        body = call.body
        if target.model is not None and target.model != call.model and body is not None:
            body = orjson.dumps({**call.json, "model": target.model})
        if call.endpoint is PASS_THROUGH:
            path = upstream.base_path + call.path[len(upstream.name) + 1 :]
        else:
            path = upstream.dialect.upstream_path(upstream.base_path, call.path)
        call.attempts += 1
        return Attempt(
            call,
            target,
            number=call.attempts,
            path=f"{path}?{call.query}" if call.query else path or "/",
            headers=headers,
            body=body or b"",
            upload=call.upload,
            timeouts=call.timeouts or upstream.timeouts,
            started_at=monotonic(),
        )

    def _count_wait(self, attempt: Attempt) -> None:
        until = attempt.first_byte_at or monotonic()
        attempt.call.upstream_wait_s += until - attempt.started_at

    def _answer_here(self, call: Call) -> Reply:
        """What the sidecar answers itself: the models the team may use."""
        if call.endpoint is MODELS:
            names = [name for name in self._models.names if call.team.may_use(name)]
            wanted = call.path.removeprefix("/v1/models").strip("/")
            if not wanted:
                return Reply.of(200, call.dialect.models_body(names))
            if wanted in names:
                return Reply.of(200, call.dialect.model_body(wanted))
            raise Rejected(404, "model_not_found", f'there is no model "{wanted}" for you here')
        raise Rejected(404, "model_not_found", f'no upstream is configured for "{call.model}"')


async def _refuse_error_event(attempt: Attempt, reply: Reply) -> None:
    """Raise when the first event of a 200 is an error, so that another target may be tried."""
    event = await reply.body.first_event()
    found = attempt.upstream.dialect.error_in(event) if event is not None else None
    if found is None:
        return
    reply.discard()
    code, message = found
    raise UpstreamError(
        Phase.FIRST_EVENT,
        Retry.SAME,
        "upstream_error_event",
        f"the upstream answered 200 and then an error ({code}): {message}"[:500],
    )

