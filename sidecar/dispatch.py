"""The hinge of the path: a call comes in, an attempt goes out.

Every attempt gets a pristine copy of head and body, whatever earlier attempts or filters did to
theirs, and ends exactly once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic
from typing import cast
from urllib.parse import unquote, unquote_plus

import orjson

from sidecar.call import (
    CLIENT_KEYS,
    Attempt,
    Call,
    KeyGate,
    Target,
    deadline_exceeded,
    digest,
    end_of,
    no_key_room,
)
from sidecar.dialects.endpoint import MODELS, PASS_THROUGH
from sidecar.errors import Rejected, UpstreamError
from sidecar.filter import AttemptNext
from sidecar.headers import Headers
from sidecar.reply import Reply
from sidecar.team import Models, offered_keys
from sidecar.transport.connection import HOP_BY_HOP
from sidecar.transport.upstream import LiveUpstream

NEVER_SENT = HOP_BY_HOP | {
    b"host",  # the upstream's own is written
    b"content-length",  # written with the body
    b"expect",  # answered by the edge
    b"accept-encoding",  # depends on whether filters look at the answer
    b"cookie",
}
NEVER_SENT_NOR_KEYS = NEVER_SENT | CLIENT_KEYS
CLIENT_KEY_PARAMETER = "access_token"
"""The same in a query: RFC 6750, 2.3; Baidu has it so."""


class Dispatch:
    """Turns calls into attempts for one chain."""

    def __init__(
        self,
        *,
        models: Models,
        taps_events: bool,
        reads_beginnings: bool = False,
        team_keys: frozenset[str] = frozenset(),
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._models = models
        self._taps_events = taps_events
        self._reads_beginnings = reads_beginnings
        self._team_keys = team_keys  # as `digest` has them
        self._now = now
        self.attempt_chain: AttemptNext = send  # replaced once the attempt filters are linked

    async def __call__(self, call: Call) -> Reply:
        """The end of the call chain: one attempt at `call.target`, or at the first target."""
        target = call.current_target
        if target is None:
            return self._answer_here(call)
        if call.time_left(self._now()) <= 0:
            raise deadline_exceeded()
        attempt = self._attempt(call, target)
        call.wait_begins(attempt.started_at)
        try:
            reply = await self.attempt_chain(attempt)
        except BaseException as error:
            call.wait_ends(attempt.first_byte_at or self._now())
            if isinstance(error, UpstreamError) and error.phase.is_ours:
                call.attempts -= 1  # the upstream was not even asked
            attempt.finish(end_of(error, call))
            raise
        call.wait_ends(attempt.first_byte_at or self._now())
        attempt.status = reply.status
        reply.body.owned_by(attempt)
        call.bodies.append(reply.body)
        return reply

    def _attempt(self, call: Call, target: Target) -> Attempt:
        upstream = cast(LiveUpstream, target.upstream)
        if upstream.dialect is not call.dialect:
            known = ", ".join(each.path for each in upstream.dialect.endpoints)
            message = f'"{call.model}" speaks the {upstream.dialect.name} dialect: call {known}'
            raise Rejected(400, "wrong_dialect", message)
        passes_key = upstream.passes_client_key
        never_sent = NEVER_SENT if passes_key else NEVER_SENT_NOR_KEYS
        fields = [
            (key, value)
            for name, value in call.raw_headers
            if (key := name.lower()) not in never_sent
        ]
        if passes_key:
            fields = [each for each in fields if not self._is_ours(*each)]
        if "connection" in call.headers:
            named = ",".join(call.headers.getall("connection")).lower().encode("latin-1", "replace")
            dropped = {name.strip() for name in named.split(b",")}
            fields = [field for field in fields if field[0] not in dropped]
        if self._taps_events:
            fields.append((b"accept-encoding", b"identity"))
        elif (accepted := call.headers.get("accept-encoding")) is not None:
            if self._reads_beginnings:
                accepted = "gzip" if "gzip" in accepted else "identity"
            fields.append((b"accept-encoding", accepted.encode("utf-8", "surrogateescape")))
        headers = Headers.of_raw(fields)
        if call.upstream_headers is not None:
            headers.put(call.upstream_headers)
        if upstream.extra_headers:
            headers.update(upstream.extra_headers)
        body, model = call.body, target.model if target.model != call.model else None
        if model is not None and body is not None and not call.endpoint.model_in_path:
            body = orjson.dumps({**call.json, "model": model})
        if call.endpoint is PASS_THROUGH:
            path = upstream.base_path + call.path[len(upstream.name) + 1 :]
        else:
            path = upstream.dialect.upstream_path(upstream.base_path, call.path, model)
        query = call.query
        if query and (CLIENT_KEY_PARAMETER in query or "%" in query):
            query = self._without_key(query, passes_key=passes_key)
        call.attempts += 1
        return Attempt(
            call,
            target,
            number=call.attempts,
            path=f"{path or '/'}?{query}" if query else path or "/",
            headers=headers,
            body=body or b"",
            upload=call.upload,
            timeouts=upstream.timeouts,
            started_at=self._now(),
        )

    def _without_key(self, query: str, *, passes_key: bool) -> str:
        """The query without the client's credentials: all of them, or those that are a team's."""
        kept = []
        for field in query.split("&"):
            name, _, value = field.partition("=")
            if unquote_plus(name) == CLIENT_KEY_PARAMETER and not (
                passes_key and digest(unquote_plus(value)) not in self._team_keys
            ):
                continue
            kept.append(field)
        return "&".join(kept)

    def _is_ours(self, name: bytes, value: bytes) -> bool:
        """Whether this is a team's key, which is no provider's business."""
        if name not in CLIENT_KEYS:
            return False
        text = value.decode("utf-8", "surrogateescape")
        return any(digest(each) in self._team_keys for each in offered_keys(text))

    def _answer_here(self, call: Call) -> Reply:
        """What the sidecar answers itself: the models the team may use."""
        if call.endpoint is MODELS:
            names = [name for name in self._models.names if call.team.may_use(name)]
            wanted = unquote(call.path.removeprefix("/v1/models").strip("/"))
            if not wanted:
                return Reply.of(200, call.dialect.models_body(names))
            if self._models.find(wanted) is not None and call.team.may_use(wanted):
                return Reply.of(200, call.dialect.model_body(wanted))
            raise Rejected(
                404, "model_not_found", f'there is no model "{wanted[:100]}" for you here'
            )
        raise Rejected(404, "model_not_found", f'no upstream is configured for "{call.model}"')


def send(attempt: Attempt) -> Awaitable[Reply]:
    """The end of the attempt chain: the transport."""
    if attempt.key_gate is not None:
        return _send_with_room(attempt, attempt.key_gate)
    return cast(LiveUpstream, attempt.upstream).send(attempt)


async def _send_with_room(attempt: Attempt, gate: KeyGate) -> Reply:
    """The same where no filter chose a key: the caller's own goes along, or none."""
    attempt.key_gate = None
    answer = gate("")
    if wait_s := answer if isinstance(answer, float) else await answer:
        raise no_key_room(wait_s)
    return await cast(LiveUpstream, attempt.upstream).send(attempt)
