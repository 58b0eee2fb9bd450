"""Usage is found in every answer that has any, wherever its bytes are cut."""

from __future__ import annotations

import gzip

import pytest

from filters.token_counter import TokenCounter
from sidecar.api import USAGE, Call, CallFilter, CallNext, Key, Reply, Usage
from sidecar.dialects import ANTHROPIC
from tests.support.harness import FakeUpstream, Harness

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
            await run.begun()
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


async def test_usage_until_the_client_left_is_kept() -> None:
    async with Harness(TokenCounter, upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        harness.upstream.answer = harness.upstream.stream(MESSAGES[:200])
        run = harness.start(harness.call(path="/v1/messages"))
        await run.begun()
        run.client_leaves()
        await run.ended()
    assert run.call[USAGE] == Usage(12, 1, cached=4)


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


async def test_answer_without_usage_has_none() -> None:
    assert await streamed(b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n") is None


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
