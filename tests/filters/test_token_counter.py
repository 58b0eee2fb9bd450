"""Usage is found in every answer that has any, wherever its bytes are cut."""

from __future__ import annotations

import asyncio
import gzip
from dataclasses import replace

import orjson
import pytest

from filters import token_counter
from filters.token_counter import TokenCounter
from sidecar.api import (
    REPORTED,
    USAGE,
    Attempt,
    Call,
    CallFilter,
    CallNext,
    Key,
    Phase,
    Reply,
    Usage,
)
from sidecar.dialects import ANTHROPIC
from tests.support.harness import MODEL, FakeUpstream, Harness, Run, Use, broken

CHAT = (
    'data: {"choices":[{"delta":{"content":"é漢 \\"usage\\": {"}}],"usage":null}\r\n\r\n'
    ": keep-alive\n\n"
    'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":7,'
    '"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    "data: [DONE]\n\n"
).encode()
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":'
    b'{"input_tokens":8,"cache_read_input_tokens":4,"output_tokens":1}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":7}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
JSON = b'{"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 7,\n\n"x": 1}}'
EXPECTED = Usage(12, 7, cached=4)


async def turns() -> None:
    """Let the call come as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def streamed(
    *pieces: bytes, path: str = "/v1/chat/completions", upstream: FakeUpstream | None = None
) -> Usage | None:
    """The usage of a stream that comes in these pieces, whose bytes must pass untouched."""
    async with Harness(TokenCounter, upstream=upstream) as harness:
        return await stream_through(harness, *pieces, path=path)


async def stream_through(harness: Harness, *pieces: bytes, path: str) -> Usage | None:
    first, *rest = pieces
    harness.upstream.answer = harness.upstream.stream(first)
    run = harness.start(harness.call(path=path))
    await run.begun()
    harness.upstream.source.feed(*rest)
    harness.upstream.source.finish()
    await run.ended()
    assert run.client.data == b"".join(pieces)
    return run.call.get(USAGE)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_usage_of_a_stream_is_the_same_wherever_it_is_cut(dialect: str) -> None:
    is_openai = dialect == "openai"
    data = CHAT if is_openai else MESSAGES
    path = "/v1/chat/completions" if is_openai else "/v1/messages"
    upstream = None if is_openai else FakeUpstream(dialect=ANTHROPIC)
    async with Harness(TokenCounter, upstream=upstream) as harness:
        for i in range(1, len(data)):
            usage = await stream_through(harness, data[:i], data[i:], path=path)
            assert usage == EXPECTED, f"cut at {i}"
        every_byte = [data[i : i + 1] for i in range(len(data))]
        assert await stream_through(harness, *every_byte, path=path) == EXPECTED


async def test_usage_of_a_whole_json_answer() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(JSON)
        run = await harness.run()
    assert run.call[USAGE] == Usage(12, 7)
    assert run.client.data == JSON


async def test_usage_of_a_json_answer_in_pieces() -> None:
    async with Harness(TokenCounter) as harness:
        for i in range(1, len(JSON)):
            harness.upstream.answer = harness.upstream.stream(
                JSON[:i], media_type="application/json"
            )
            run = harness.start()
            await turns()
            harness.upstream.source.finish(JSON[i:])
            await run.ended()
            assert run.call[USAGE] == Usage(12, 7), f"cut at {i}"


async def test_usage_of_an_upstream_that_compresses_all_the_same() -> None:
    packed = gzip.compress(CHAT)
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.stream(packed[:20], encoding="gzip")
        run = harness.start()
        await run.begun()
        harness.upstream.source.finish(packed[20:])
        await run.ended()
    assert run.call[USAGE] == EXPECTED
    assert run.client.data == packed


async def test_beginning_of_a_report_is_no_end_though_nothing_came_after_it() -> None:
    async with Harness(TokenCounter, upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        harness.upstream.answer = harness.upstream.stream(MESSAGES[:200])
        run = harness.start(harness.call(path="/v1/messages"))
        await run.begun()
        run.client_leaves()
        await run.ended()
    assert run.call[USAGE] == Usage(12, 1, cached=4, is_estimated=True)
    assert run.call[REPORTED] == Usage(12, 1, cached=4)


async def test_stream_that_ends_with_an_error_event_is_counted_as_far_as_it_came() -> None:
    error = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'
    async with Harness(TokenCounter, upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        start = MESSAGES[: MESSAGES.index(b"event: content_block_delta")]
        call = harness.call(path="/v1/messages")
        run = await stream_of(harness, call, start, error)
        assert (run.call[REPORTED], run.call[USAGE].is_estimated) == (Usage(12, 1, cached=4), True)


async def test_usage_is_there_for_the_debts_of_the_call() -> None:
    seen: list[Usage | None] = []

    class Settles(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.on_end(lambda end: seen.append(call.get(USAGE)))
            return await call_next(call)

    async with Harness(Settles, TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(JSON)
        await harness.run()
    assert seen == [Usage(12, 7)]


@pytest.mark.parametrize("status", [201, 400, 429, 500])
async def test_only_a_200_is_looked_at(status: int) -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(JSON, status=status)
        run = await harness.run()
    assert USAGE not in run.call


async def test_answer_of_a_path_that_names_no_model_is_not_looked_at() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(JSON)
        run = await harness.run(harness.call(path="/fake/files"))
    assert USAGE not in run.call


async def test_upstream_is_asked_for_an_uncompressed_answer() -> None:
    async with Harness(TokenCounter) as harness:
        await harness.run(harness.call(headers=[("accept-encoding", "gzip")]))
    assert harness.upstream.sent[0].headers["accept-encoding"] == "identity"


def test_it_says_what_it_gives() -> None:
    keys: frozenset[Key[Usage]] = TokenCounter.gives
    assert keys == {USAGE}
    assert TokenCounter.taps_events


# What nobody reports

TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"Fine, thanks, and you?"}}]}\n\n'
ALONE = b'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def streamed_call(harness: Harness, **fields: object) -> Call:
    messages = [{"role": "user", "content": "How are you today?"}]
    return harness.call({"model": MODEL, "stream": True, "messages": messages, **fields})


async def stream_of(harness: Harness, call: Call, *pieces: bytes) -> Run:
    harness.upstream.answer = harness.upstream.stream(pieces[0])
    run = harness.start(call)
    await run.begun()
    harness.upstream.source.feed(*pieces[1:])
    harness.upstream.source.finish()
    await run.ended()
    return run


async def test_usage_is_asked_for_and_hidden_from_a_caller_that_did_not() -> None:
    async with Harness(TokenCounter) as harness:
        run = await stream_of(harness, streamed_call(harness), TEXT, ALONE, DONE)
        sent = orjson.loads(harness.upstream.sent[0].body)
        assert sent["stream_options"] == {"include_usage": True}
        assert run.client.data == TEXT + DONE
        assert run.call[USAGE] == Usage(12, 7)


async def test_caller_that_asked_for_usage_sees_it_and_its_body_is_untouched() -> None:
    async with Harness(TokenCounter) as harness:
        call = streamed_call(harness, stream_options={"include_usage": True})
        body = call.body
        run = await stream_of(harness, call, TEXT, ALONE, DONE)
        assert harness.upstream.sent[0].body == body
        assert run.client.data == TEXT + ALONE + DONE
        assert run.call[USAGE] == Usage(12, 7)


@pytest.mark.parametrize(
    "use",
    [
        Use(TokenCounter, {"ask_for_usage": False}),
        Use(TokenCounter, upstreams={"fake": TokenCounter.UpstreamConfig(ask_for_usage=False)}),
    ],
    ids=["filter", "upstream"],
)
async def test_usage_is_not_asked_for_where_it_is_refused(use: Use) -> None:
    async with Harness(use) as harness:
        call = streamed_call(harness)
        body = call.body
        run = await stream_of(harness, call, TEXT, DONE)
        assert harness.upstream.sent[0].body == body
        assert run.call[USAGE].is_estimated


async def test_stream_without_usage_is_counted_and_marked() -> None:
    async with Harness(TokenCounter) as harness:
        run = await stream_of(harness, streamed_call(harness), TEXT, TEXT, DONE)
        usage = run.call[USAGE]
        assert usage.is_estimated
        assert 8 <= usage.input <= 16
        assert 10 <= usage.output <= 18
        assert REPORTED not in run.call


async def test_answer_without_usage_is_counted_before_its_head_goes_out() -> None:
    seen: list[Usage | None] = []

    class Outside(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            reply = await call_next(call)
            seen.append(call.get(USAGE))
            return reply

    async with Harness(Outside, TokenCounter) as harness:
        data = b'{"choices":[{"message":{"content":"Fine, thanks, and you?"}}]}'
        harness.upstream.answer = harness.upstream.whole(data)
        await harness.run()
        (usage,) = seen
        assert usage is not None
        assert usage.is_estimated
        assert 4 <= usage.output <= 10


async def test_answer_that_comes_in_pieces_is_known_before_its_head_goes_out() -> None:
    seen: list[Usage | None] = []

    class Outside(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            reply = await call_next(call)
            seen.append(call.get(USAGE))
            return reply

    async with Harness(Outside, TokenCounter) as harness:
        upstream = harness.upstream
        upstream.answer = upstream.stream(JSON[:20], media_type="application/json")
        run = harness.start()
        await turns()
        for at in range(20, len(JSON), 10):
            upstream.source.feed(JSON[at : at + 10])
            await asyncio.sleep(0)
        upstream.source.finish()
        await run.ended()
        assert run.client.data == JSON
        assert seen == [EXPECTED._replace(cached=0)]


async def test_stream_whose_client_leaves_is_counted_as_far_as_it_came() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.stream(TEXT)
        run = harness.start(streamed_call(harness))
        await run.begun()
        harness.upstream.source.feed(TEXT, TEXT)
        run.client_leaves()
        await run.ended()
        usage = run.call[USAGE]
        assert usage.is_estimated
        assert 15 <= usage.output <= 27


async def test_part_that_was_reported_of_a_cut_stream_is_told_beside_the_count() -> None:
    delta = (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"Fine, thanks, and you?"}}\n\n'
    )
    start = MESSAGES[: MESSAGES.index(b"event: content_block_delta")]
    async with Harness(TokenCounter, upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        harness.upstream.answer = harness.upstream.stream(start)
        run = harness.start(harness.call(path="/v1/messages"))
        await run.begun()
        harness.upstream.source.feed(delta, delta, delta)
        harness.upstream.source.fail()
        await run.ended()
        assert run.call[REPORTED] == Usage(12, 1, cached=4)
        usage = run.call[USAGE]
        assert (usage.input, usage.cached, usage.is_estimated) == (12, 4, True)
        assert usage.output > 10


async def test_report_that_covers_all_that_came_is_no_estimate_though_the_stream_is_cut() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.stream(TEXT)
        run = harness.start(streamed_call(harness))
        await run.begun()
        harness.upstream.source.feed(ALONE)
        run.client_leaves()
        await run.ended()
        assert run.call[USAGE] == Usage(12, 7)


async def test_call_that_was_refused_or_failed_took_nothing() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.failing(broken(Phase.CONNECT))
        assert USAGE not in (await harness.run()).call
        harness.upstream.answer = harness.upstream.whole(b'{"error":{}}', status=400)
        assert USAGE not in (await harness.run()).call


async def test_client_that_leaves_before_the_first_byte_owes_its_prompt() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.silent()
        run = harness.start(streamed_call(harness))
        await harness.upstream.asked.wait()
        run.client_leaves()
        await run.ended()
        usage = run.call[USAGE]
        assert (usage.output, usage.is_estimated) == (0, True)
        assert usage.input >= 8


async def test_nothing_is_counted_if_told() -> None:
    async with Harness(Use(TokenCounter, {"count_missing": False})) as harness:
        run = await stream_of(harness, streamed_call(harness), TEXT, DONE)
        assert USAGE not in run.call


async def test_what_is_kept_to_be_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counter, "MAX_KEPT_BYTES", 3 * len(TEXT))
    async with Harness(TokenCounter) as harness:
        counter = harness.filters[0]
        assert isinstance(counter, TokenCounter)
        harness.upstream.answer = harness.upstream.stream(TEXT)
        run = harness.start(streamed_call(harness))
        await run.begun()
        harness.upstream.source.feed(*[TEXT] * 50)
        assert counter._kept.bytes == 3 * len(TEXT)
        run.client_leaves()
        await run.ended()
        assert counter._kept.bytes == 0
        assert run.call[USAGE].output > 51 * 4  # the rest by its length


@pytest.mark.parametrize("media_type", ["text/event-stream", "application/json"])
async def test_refusal_inside_a_200_took_nothing(media_type: str) -> None:
    error = b'{"error":{"message":"overloaded","code":"overloaded"}}'
    async with Harness(TokenCounter) as harness:
        if media_type == "application/json":
            harness.upstream.answer = harness.upstream.whole(error)
            run = await harness.run()
        else:
            event = b"data: " + error + b"\n\n"
            run = await stream_of(harness, streamed_call(harness), event, DONE)
        assert run.call.get(USAGE) in (None, Usage())


async def test_client_that_leaves_while_a_whole_answer_comes_owes_what_came() -> None:
    async with Harness(TokenCounter) as harness:
        answer = b'{"choices":[{"message":{"content":"Fine, thanks, and you? ' + b"word " * 40
        harness.upstream.answer = harness.upstream.stream(answer, media_type="application/json")
        run = harness.start()
        await turns()
        run.client_leaves()
        await run.ended()
        assert run.call[USAGE].is_estimated
        assert run.call[USAGE].output > 30


async def test_tokens_that_are_only_counted_are_not_used() -> None:
    async with Harness(TokenCounter, upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        harness.upstream.answer = harness.upstream.whole(b'{"input_tokens":14}')
        run = await harness.run(harness.call(path="/v1/messages/count_tokens"))
        assert USAGE not in run.call


@pytest.mark.parametrize("encoding", ["gzip", "br"])
async def test_compressed_stream_is_not_held_to_take_usage_out(encoding: str) -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.stream(b"\x1f\x8b", encoding=encoding)
        run = harness.start(streamed_call(harness))
        await run.begun()
        harness.upstream.source.feed(b"\x08")
        assert run.client.data == b"\x1f\x8b\x08"
        run.client_leaves()
        await run.ended()


async def test_answer_that_is_no_json_is_not_waited_for() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.stream(b"ID3", media_type="audio/mpeg")
        run = harness.start(streamed_call(harness))
        await run.begun()
        assert run.client.data == b"ID3"
        run.client_leaves()
        await run.ended()


async def test_json_answer_to_a_call_for_a_stream_passes_as_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_counter, "MAX_JSON_BYTES", 20)
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.stream(JSON[:30], media_type="application/json")
        run = harness.start(streamed_call(harness))
        await run.begun()
        assert run.client.data == JSON[:30]
        harness.upstream.source.finish(JSON[30:])
        await run.ended()
        assert run.client.data == JSON
        assert run.call[USAGE] == Usage(12, 7)


async def test_vocabularies_are_loaded_before_the_first_call_if_told() -> None:
    async with Harness(Use(TokenCounter, {"load_at_start": ["gpt-4o", "gpt-4.1"]})) as harness:
        counter = harness.filters[0]
        assert isinstance(counter, TokenCounter)
        assert await counter._vocabularies.warm([]) == ("o200k_base",)


REFUSED = b'{"detail":[{"type":"extra_forbidden","loc":["body","stream_options","include_usage"]}]}'


async def test_upstream_that_refuses_to_be_asked_for_usage_is_asked_once_and_never_again() -> None:
    async with Harness(TokenCounter) as harness:
        upstream = harness.upstream
        streams = upstream.stream(TEXT)

        async def answer(attempt: Attempt) -> Reply:
            if b"include_usage" in attempt.body:
                return Reply.of(422, REFUSED)
            return await streams(attempt)

        upstream.answer = answer
        for _ in range(2):
            run = harness.start(streamed_call(harness))
            await run.begun()
            upstream.source.feed(DONE)
            upstream.source.finish()
            await run.ended()
            assert (run.client.status, run.client.data) == (200, TEXT + DONE)
        assert ["include_usage" in each.body.decode() for each in upstream.sent] == [
            *(True, False),
            False,
        ]


async def test_refusal_for_another_reason_is_the_caller_s() -> None:
    async with Harness(TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(b'{"error":{}}', status=422)
        run = await harness.run(streamed_call(harness))
        assert run.client.status == 422
        assert len(harness.upstream.sent) == 1


async def test_upstream_known_to_refuse_is_not_asked() -> None:
    section = TokenCounter.UpstreamConfig(ask_for_usage=None)
    async with Harness(Use(TokenCounter, upstreams={"fake": section})) as harness:
        counter = harness.filters[0]
        assert isinstance(counter, TokenCounter)
        assert counter._refusing == set()
    kit = replace(counter.kit, origins={"fake": ("https", "api.mistral.ai")})
    assert TokenCounter(TokenCounter.Config(), kit)._refusing == {"fake"}
