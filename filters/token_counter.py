"""What a call used: as its provider reports it, or counted here."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

import orjson
from pydantic import NonNegativeInt

from filters.algo.estimate import NO_TOKENS
from filters.algo.include_usage import ASKS, MARK, UsageRemover, ask_for_usage
from filters.algo.served import may_have_served
from filters.algo.texts import READ_BYTES, count_answer, count_request
from filters.algo.tokens import Vocabularies
from sidecar.api import (
    CACHED,
    COMPLETED,
    REPORTED,
    USAGE,
    Body,
    Call,
    CallFilter,
    CallNext,
    Decoder,
    End,
    Event,
    FilterConfig,
    JsonEvent,
    Kit,
    Reply,
    Usage,
)

JSON = "application/json"
REFUSING_HOSTS = ("api.mistral.ai",)
"""Which report usage in streams unasked, and refuse to be asked (422, "extra_forbidden")."""
MAX_JSON_BYTES = 1024 * 1024
"""A JSON answer is waited for until it is so long: its usage stands at the end."""
MAX_KEPT_BYTES = 64 * 1024 * 1024
"""The same of all answers together; of further ones only the length is known."""


class TokenCounter(CallFilter):
    """Leaves what a call used on it, for log, metrics, limits, cost and budgets.

    Switch it on for token counts: of every answer, in every dialect, streams included. OpenAI-like
    upstreams are asked to report usage in streams, and callers that did not ask never see it. Where
    no usage is reported, or an answer is cut, tokens are counted here and marked as estimated.
    Place it inside of those who read the figures, and before `cache`.
    """

    class Config(FilterConfig):
        ask_for_usage: bool = True
        """Have OpenAI-like upstreams report usage in streams (`stream_options.include_usage`)."""
        count_missing: bool = True
        """Count tokens that no provider reports."""
        max_vocabularies: NonNegativeInt = 2
        """Vocabularies in memory, 24 to 50 MB each, loaded when first needed (extra `tokens`);
        further models are estimated. 0: all are."""
        load_at_start: list[str] = []
        """Models whose vocabularies are loaded at the start: loading holds the process for 10 to 40
        ms, which calls would notice later."""

    class UpstreamConfig(FilterConfig):
        ask_for_usage: bool | None = None
        """Whether it takes `stream_options.include_usage`; null: as its host is known for, and
        until it refuses it."""

    gives = frozenset({USAGE})
    taps_events = True

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._refusing = {
            name for name, (_, host) in kit.origins.items() if host.endswith(REFUSING_HOSTS)
        }
        for name, each in kit.upstreams.items():
            if each.ask_for_usage is not None:
                (self._refusing.discard if each.ask_for_usage else self._refusing.add)(name)
        self._kept: Kept = kit.resources.get(("token_counter",), Kept)
        self._vocabularies = kit.resources.get(
            ("vocabularies", config.max_vocabularies),
            lambda: Vocabularies(config.max_vocabularies),
        )

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if not call.endpoint.has_model or call.endpoint.name in NO_TOKENS:
            return call_next(call)
        return self._count(call, call_next)

    async def _count(self, call: Call, call_next: CallNext) -> Reply:
        asked_body = call.body
        hides_usage = (
            call.is_stream
            and call.endpoint.name in ASKS
            and call.dialect.name == "openai"
            and self.config.ask_for_usage
            and not (self._refusing and self._refuses(call))
            and ask_for_usage(call)
        )
        reply = await self._ask(call, call_next)
        if hides_usage and reply.status in (400, 422) and await self._is_for_asking(call, reply):
            reply.discard()
            assert asked_body is not None
            call.replace_json(orjson.loads(asked_body), body=asked_body)
            hides_usage = False
            reply = await self._ask(call, call_next)
        if reply.status != 200:
            return reply
        body = reply.body
        if call.get(CACHED) == "hit":
            if USAGE not in call and self.config.count_missing and body.is_whole:
                data = body.peek()
                call[USAGE] = self.counted(call, (data[:READ_BYTES],), body.media_type, len(data))
            if hides_usage and _has_plain_events(body):
                body.map(UsageRemover())
            return reply
        is_json = body.media_type == JSON and not body.encoding
        if is_json and body.is_whole:
            if USAGE not in call:  # read already, as several calls share the answer
                self._read_whole(call, body.peek())
            return reply
        count = Count(self, call, body.media_type)
        call.on_end(count.ended)
        if is_json:
            try:
                await body.wait_for(MAX_JSON_BYTES)
            except BaseException:  # its client left, or its time is over
                count.see(body.peek())
                raise
            if body.is_whole:
                self._read_whole(call, body.peek())
                return reply
        body.tap_bytes(count.see)
        body.tap_events(count.read, containing=MARK)
        if hides_usage and _has_plain_events(body):
            body.map(UsageRemover())
        return reply

    def _read_whole(self, call: Call, data: bytes) -> None:
        """The whole answer, before anybody has it."""
        event = JsonEvent(data)
        usage = call.dialect.usage(event, None) if MARK in data else None
        if usage is None:
            if b"error" in data and call.dialect.error_in(event) is not None:
                usage = Usage()  # Qianfan refuses with a 200
            elif self.config.count_missing:
                usage = self.counted(call, (data[:READ_BYTES],), JSON, len(data))
            else:
                return
        call[USAGE] = usage

    def _refuses(self, call: Call) -> bool:
        targets = (call.target,) if call.target is not None else call.targets
        return any(each.upstream.name in self._refusing for each in targets)

    async def _is_for_asking(self, call: Call, reply: Reply) -> bool:
        """Whether the upstream refuses the call because it was asked for usage; if so, it is not
        any more."""
        begin = await reply.beginning()
        if b"stream_options" not in begin and b"include_usage" not in begin:
            return False
        target = call.current_target
        assert target is not None
        name = target.upstream.name
        if name not in self._refusing:
            self._refusing.add(name)
            self.kit.log.warning("usage_not_asked_for", extra={"upstream": name})
        return True

    async def _ask(self, call: Call, call_next: CallNext) -> Reply:
        try:
            return await call_next(call)
        except BaseException:
            call.on_end(Count(self, call, "").ended)  # its provider may have read the prompt
            raise

    def counted(self, call: Call, pieces: Sequence[bytes], media_type: str, size: int) -> Usage:
        """What an answer of `size` bytes took, of which these are the first."""
        target = call.current_target
        model = (target.model if target is not None else None) or call.model or ""
        vocabularies = self._vocabularies
        return Usage(
            input=count_request(call, model, vocabularies),
            output=count_answer(call.dialect.name, model, pieces, media_type, size, vocabularies),
            is_estimated=True,
        )

    async def start(self) -> None:
        if self.config.load_at_start:
            await self._vocabularies.warm(self.config.load_at_start)

    async def stop(self) -> None:
        await self._vocabularies.settled()


def _has_plain_events(body: Body) -> bool:
    """Whether single events can be taken out of it. Of a compressed stream, which was not asked
    for, they cannot."""
    return body.is_stream and body.encoding in ("", "identity")


class Kept:
    """How many bytes of answers are kept at the moment."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Count:
    """What is known of one call."""

    __slots__ = ("_call", "_filter", "_is_final", "_kept", "_kept_bytes", "_media_type", "_seen")

    def __init__(self, counter: TokenCounter, call: Call, media_type: str) -> None:
        self._filter = counter
        self._call = call
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._seen = 0  # bytes of the answer so far
        self._is_final: bool | None = None  # whether the last report was; None: there was none
        self._media_type = media_type

    def see(self, data: bytes) -> None:
        size = len(data)
        self._seen += size
        if self._kept_bytes < READ_BYTES:
            total = self._filter._kept
            if total.bytes < MAX_KEPT_BYTES:
                self._kept.append(data)
                self._kept_bytes += size
                total.bytes += size

    def read(self, event: Event) -> None:
        call = self._call
        before = call.get(USAGE)
        usage = call.dialect.usage(event, before)
        if usage is not before and usage is not None:
            call[USAGE] = usage
            self._is_final = b'"message_start"' not in event.raw  # Anthropic's: a beginning only

    def ended(self, end: End) -> None:
        """Before those read the figures who stand outside."""
        call, counter = self._call, self._filter
        counter._kept.bytes -= self._kept_bytes
        if CACHED in call or not counter.config.count_missing:
            return
        usage = call.get(USAGE)
        if usage is not None and self._is_final is not False:
            return  # reported to the end, or told by somebody else, who has seen all of it
        if not call.attempts or not may_have_served(end):
            return
        if end.outcome is COMPLETED and (end.status != 200 or self._begins_with_error()):
            return
        counted = counter.counted(call, self._kept, self._media_type, self._seen)
        if usage is not None:
            call[REPORTED] = usage
            counted = usage._replace(
                input=usage.input or counted.input,
                output=max(usage.output, counted.output),
                is_estimated=True,
            )
        call[USAGE] = counted

    def _begins_with_error(self) -> bool:
        """Whether the first event of a 200 is a refusal."""
        begin = b"".join(self._kept[:4])
        if b"error" not in begin:
            return False
        events = Decoder().feed(begin)
        return bool(events) and self._call.dialect.error_in(events[0]) is not None
