"""What was asked before is answered from the cache; what nobody may share is not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from filters.cache import Cache
from filters.token_counter import TokenCounter
from sidecar.api import CACHED, USAGE, Call, Phase, Usage
from sidecar.dialects import ANTHROPIC
from tests.support.harness import MODEL, FakeUpstream, Harness, Run, Use, broken

ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1760000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Fine, thanks."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    }
)
EVENTS = [
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"Fine"},"finish_reason":null}]}'
    b"\n\n",
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":", thanks."},"finish_reason":null}]}\n\n',
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
]
USAGE_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"m",'
    b'"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15}}\n\n'
)
DONE = b"data: [DONE]\n\n"
TOOK = Usage(12, 3)


def caching(upstream: FakeUpstream | None = None, **settings: Any) -> Harness:
    return Harness(TokenCounter, Use(Cache, settings), upstream=upstream)


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with caching() as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        yield harness


def asking(
    harness: Harness,
    text: str = "How are you?",
    *,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
    **fields: Any,
) -> Call:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0}
    return harness.call({**body, **fields}, headers=(headers or {}).items(), path=path)


async def ask(harness: Harness, *args: Any, **kwargs: Any) -> Run:
    return await harness.run(asking(harness, *args, **kwargs))


def word(run: Run) -> str | None:
    return run.client.headers.get("x-sidecar-cache")


async def stream(harness: Harness, *pieces: bytes, call: Call | None = None) -> Run:
    """A call whose stream comes in these pieces."""
    harness.upstream.answer = harness.upstream.stream(pieces[0])
    run = harness.start(call or asking(harness, stream=True))
    await run.begun()
    harness.upstream.source.feed(*pieces[1:])
    harness.upstream.source.finish()
    await run.ended()
    return run


# Hits


async def test_second_identical_call_is_a_hit_and_the_same_bytes(harness: Harness) -> None:
    first, second = await ask(harness), await ask(harness)
    assert (word(first), word(second)) == ("miss", "hit")
    assert first.client.data == second.client.data == ANSWER
    assert second.client.headers["age"] == "0"
    assert second.client.headers["content-type"] == "application/json"
    assert len(harness.upstream.sent) == 1


async def test_usage_of_a_hit_is_there_and_marked_cached(harness: Harness) -> None:
    first, second = await ask(harness), await ask(harness)
    assert first.call[USAGE] == second.call[USAGE] == TOOK
    assert CACHED not in first.call
    assert second.call[CACHED] == "hit"
    assert (first.call.attempts, second.call.attempts) == (1, 0)


async def test_results_are_counted(harness: Harness) -> None:
    await ask(harness)
    await ask(harness)
    await ask(harness, temperature=1)
    counts = {
        result: harness.value("llm_sidecar_cache", team="tests", result=result)
        for result in ("hit", "miss", "join", "bypass")
    }
    assert counts == {"hit": 1, "miss": 1, "join": 0, "bypass": 1}


async def test_stream_is_replayed_byte_for_byte(harness: Harness) -> None:
    pieces = [*EVENTS, USAGE_EVENT, DONE]
    asked = {"include_usage": True}
    call = asking(harness, stream=True, stream_options=asked)
    first = await stream(harness, *pieces, call=call)
    second = await ask(harness, stream=True, stream_options=asked)
    assert (word(first), word(second)) == ("miss", "hit")
    assert first.client.data == second.client.data == b"".join(pieces)
    assert second.client.headers["content-type"] == "text/event-stream"
    assert second.call[USAGE] == TOOK


async def test_stream_is_replayed_as_each_caller_asked_for_its_usage(harness: Harness) -> None:
    plain = await stream(harness, *EVENTS, USAGE_EVENT, DONE)
    again = await ask(harness, stream=True)
    asked = await ask(harness, stream=True, stream_options={"include_usage": True})
    assert [word(run) for run in (plain, again, asked)] == ["miss", "hit", "hit"]
    assert plain.client.data == again.client.data == b"".join([*EVENTS, DONE])
    assert asked.client.data == b"".join([*EVENTS, USAGE_EVENT, DONE])


async def test_whole_answer_is_made_of_a_recorded_stream(harness: Harness) -> None:
    await stream(harness, *EVENTS, USAGE_EVENT, DONE)
    whole = await ask(harness)
    assert word(whole) == "hit"
    assert whole.client.headers["content-type"] == "application/json"
    answer = orjson.loads(whole.client.data)
    assert answer["choices"][0]["message"]["content"] == "Fine, thanks."
    assert answer["usage"]["completion_tokens"] == 3


async def test_stream_is_made_of_a_recorded_answer(harness: Harness) -> None:
    await ask(harness)
    streamed = await ask(harness, stream=True)
    asked = await ask(harness, stream=True, stream_options={"include_usage": True})
    assert (word(streamed), word(asked)) == ("hit", "hit")
    assert streamed.client.headers["content-type"] == "text/event-stream"
    assert b"Fine, thanks." in streamed.client.data
    assert b'"usage":{' not in streamed.client.data
    assert b'"usage":{' in asked.client.data
    assert streamed.client.data.endswith(DONE)


async def test_stream_comes_in_its_own_rhythm_if_it_is_told_to() -> None:
    async with caching(replay="rhythm") as harness:
        harness.upstream.answer = harness.upstream.stream(EVENTS[0])
        run = harness.start(asking(harness, stream=True))
        await run.begun()
        for piece in (*EVENTS[1:], DONE):
            harness.clock.turn(0.5)
            harness.upstream.source.feed(piece)
        harness.upstream.source.finish()
        await run.ended()
        again = harness.start(asking(harness, stream=True))
        await again.begun()
        assert again.client.pieces == EVENTS[:1]
        harness.clock.turn(0.4)
        assert again.client.pieces == EVENTS[:1]
        for count in (2, 3, 4):
            harness.clock.turn(0.5)
            assert len(again.client.pieces) == count
        await again.ended()
        assert again.client.data == run.client.data
        assert again.client.is_complete


async def test_client_that_leaves_a_rhythmic_replay_leaves_no_timer() -> None:
    async with caching(replay="rhythm") as harness:
        harness.upstream.answer = harness.upstream.stream(EVENTS[0])
        run = harness.start(asking(harness, stream=True))
        await run.begun()
        harness.clock.turn(5)
        harness.upstream.source.feed(DONE)
        harness.upstream.source.finish()
        await run.ended()
        again = harness.start(asking(harness, stream=True))
        await again.begun()
        again.client_leaves()
        await again.ended()
        assert harness.clock._timers == []


# What is the same


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "somebody"},
        {"metadata": {"trace": "1"}},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
    ],
    ids=str,
)
async def test_field_that_does_not_change_the_answer_is_left_out(
    harness: Harness, fields: dict[str, Any]
) -> None:
    await ask(harness)
    assert word(await ask(harness, **fields)) == "hit"


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"max_tokens": 5},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"top_p": 0.5},
        {"n": 2},
        {"stop": ["x"]},
        {"logprobs": True},
        {"something_new": 1},
        {"text": "How are you? "},
    ],
    ids=str,
)
async def test_field_that_may_change_the_answer_makes_another_key(
    harness: Harness, fields: dict[str, Any]
) -> None:
    await ask(harness)
    assert word(await ask(harness, **fields)) == "miss"


async def test_order_of_fields_and_white_space_of_the_json_do_not_matter(harness: Harness) -> None:
    one = b'{"model":"%b","temperature":0,"messages":[{"role":"user","content":"x"}]}'
    other = b'{ "messages": [{"content":"x", "role":"user"}], "temperature":0, "model":"%b"}'
    await harness.run(harness.call(one % MODEL.encode()))
    assert word(await harness.run(harness.call(other % MODEL.encode()))) == "hit"


@pytest.mark.parametrize("zero", [b"0.0", b"-0.0", b"0e0"])
async def test_temperature_zero_is_the_same_however_it_is_written(
    harness: Harness, zero: bytes
) -> None:
    await ask(harness)
    body = asking(harness).body
    assert body is not None
    call = harness.call(body.replace(b'"temperature":0', b'"temperature":' + zero))
    assert word(await harness.run(call)) == "hit"


async def test_number_that_json_cannot_hold_exactly_is_not_cached(harness: Harness) -> None:
    body = b'{"model":"%b","temperature":0,"messages":[],"seed":123456789012345678901234567890}'
    for _ in range(2):
        assert word(await harness.run(harness.call(body % MODEL.encode()))) == "bypass"


async def test_body_that_names_a_field_twice_is_not_cached(harness: Harness) -> None:
    body = (
        b'{"model":"%b","temperature":0,"messages":[{"role":"user","content":"evil"}],'
        b'"messages":[{"role":"user","content":"How are you?"}]}'
    )
    assert word(await harness.run(harness.call(body % MODEL.encode()))) == "bypass"


async def test_prompts_that_look_the_same_are_the_same_only_if_told() -> None:
    texts = ("Caf\u00e9  au lait", "Cafe\u0301 au lait \n")
    async with caching() as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        assert [word(await ask(harness, text)) for text in texts] == ["miss", "miss"]
    async with caching(normalise_prompt=True) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        assert [word(await ask(harness, text)) for text in texts] == ["miss", "hit"]


async def test_header_that_goes_to_the_provider_makes_another_key(harness: Harness) -> None:
    await ask(harness)
    assert word(await ask(harness, headers={"OpenAI-Beta": "assistants=v2"})) == "miss"
    assert word(await ask(harness, headers={"openai-beta": "assistants=v2"})) == "hit"


async def test_headers_of_sdks_and_of_tracing_do_not(harness: Harness) -> None:
    await ask(harness)
    headers = {
        "X-Stainless-Retry-Count": "1",
        "User-Agent": "x",
        "traceparent": "00-1",
        "Authorization": "Bearer k",
        "x-request-id": "1",
    }
    assert word(await ask(harness, headers=headers)) == "hit"


async def test_further_fields_and_headers_are_left_out_if_told() -> None:
    settings = {"ignore_fields": ["trace"], "ignore_headers": ["X-Trace"]}
    async with caching(**settings) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        await ask(harness)
        assert word(await ask(harness, trace="1", headers={"x-trace": "2"})) == "hit"


@pytest.mark.parametrize(("scope", "second"), [("team", "hit"), ("all", "hit"), ("key", "miss")])
async def test_scope_says_who_shares(scope: str, second: str) -> None:
    async with caching(scope=scope) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        await ask(harness, headers={"authorization": "Bearer one"})
        assert word(await ask(harness, headers={"authorization": "Bearer two"})) == second
        assert word(await ask(harness, headers={"authorization": "Bearer one"})) == "hit"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"authorization": "Bearer one"}, {"authorization": "Bearer two"}),
        ({"authorization": "Basic b25l"}, {"authorization": "Basic dHdv"}),
        ({"x-goog-api-key": "one"}, {"x-goog-api-key": "two"}),
        (
            {"authorization": "Bearer team", "x-api-key": "one"},
            {"authorization": "Bearer team", "x-api-key": "two"},
        ),
    ],
    ids=str,
)
async def test_answers_to_callers_own_keys_are_never_shared(
    one: dict[str, str], other: dict[str, str]
) -> None:
    upstream = FakeUpstream()
    upstream.passes_client_key = True
    upstream.answer = upstream.whole(ANSWER)
    async with caching(upstream, scope="all") as harness:
        await ask(harness, headers=one)
        assert word(await ask(harness, headers=other)) == "miss"
        assert word(await ask(harness, headers=one)) == "hit"


async def test_teams_with_other_settings_do_not_share() -> None:
    async with Harness(TokenCounter, Use(Cache, {"scope": "all"})) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        plain = (await ask(harness)).client.headers["x-sidecar-cache-key"]
    async with Harness(
        TokenCounter, Use(Cache, {"scope": "all", "ignore_fields": ["tools"]})
    ) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        assert (await ask(harness)).client.headers["x-sidecar-cache-key"] != plain


@pytest.mark.parametrize(
    "fields",
    [
        {"web_search_options": {"x": 1}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"enable_search": True},
    ],
    ids=str,
)
async def test_answer_that_depends_on_the_world_is_not_cached(
    harness: Harness, fields: dict[str, Any]
) -> None:
    assert word(await ask(harness, **fields)) == "bypass"


async def test_request_too_long_for_a_quick_key_is_passed_by(harness: Harness) -> None:
    assert word(await ask(harness, "x" * 300_000)) == "bypass"


async def test_stream_with_further_options_is_not_shared_with_others(harness: Harness) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    await stream(
        harness,
        *EVENTS,
        USAGE_EVENT,
        DONE,
        call=asking(harness, stream=True, stream_options=options),
    )
    again = await stream(harness, *EVENTS, USAGE_EVENT, DONE)
    assert word(again) == "miss"


async def test_stream_kept_without_usage_is_not_given_to_one_that_asks_for_it() -> None:
    counter = Use(TokenCounter, {"ask_for_usage": False})
    async with Harness(counter, Cache) as harness:
        await stream(harness, *EVENTS, DONE)
        asked = {"include_usage": True}
        call = asking(harness, stream=True, stream_options=asked)
        assert word(await stream(harness, *EVENTS, USAGE_EVENT, DONE, call=call)) == "miss"
        assert word(await ask(harness, stream=True)) == "hit"
        both = await ask(harness, stream=True, stream_options=asked)
        assert (word(both), USAGE_EVENT in both.client.data) == ("hit", True)


# What is not kept


@pytest.mark.parametrize("temperature", [0.7, 1, None, True, "0"])
async def test_call_that_asks_for_another_answer_each_time_is_passed_by(
    harness: Harness, temperature: Any
) -> None:
    fields = {} if temperature is None else {"temperature": temperature}
    body = {"model": MODEL, "messages": [], **fields}
    for _ in range(2):
        assert word(await harness.run(harness.call(body))) == "bypass"
    assert len(harness.upstream.sent) == 2


async def test_any_temperature_is_cached_if_told() -> None:
    async with caching(any_temperature=True) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        assert [word(await ask(harness, temperature=1)) for _ in range(2)] == ["miss", "hit"]
        assert word(await ask(harness, temperature=0.9)) == "miss"


async def test_embeddings_need_no_temperature(harness: Harness) -> None:
    body = {"model": MODEL, "input": "x"}
    words = [word(await harness.run(harness.call(body, path="/v1/embeddings"))) for _ in range(2)]
    assert words == ["miss", "hit"]


@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "background"])
async def test_answer_that_depends_on_what_the_provider_keeps_is_not_cached(
    harness: Harness, field: str
) -> None:
    fields = {"model": MODEL, "input": "x", "temperature": 0, field: "y"}
    run = await harness.run(harness.call(fields, path="/v1/responses"))
    assert word(run) == "bypass"


async def test_no_store_is_neither_answered_nor_kept(harness: Harness) -> None:
    quiet = {"cache-control": "no-store"}
    words = [word(await ask(harness, headers=quiet)), word(await ask(harness))]
    words.append(word(await ask(harness, headers=quiet)))
    assert words == ["bypass", "miss", "bypass"]


@pytest.mark.parametrize(
    "headers",
    [{"cache-control": "no-cache"}, {"pragma": "no-cache"}, {"cache-control": "max-age=0"}],
    ids=str,
)
async def test_no_cache_asks_again_and_keeps_the_new_answer(
    harness: Harness, headers: dict[str, str]
) -> None:
    await ask(harness)
    newer = ANSWER.replace(b"Fine", b"Well")
    harness.upstream.answer = harness.upstream.whole(newer)
    again = await ask(harness, headers=headers)
    assert (word(again), again.client.data) == ("miss", newer)
    assert (await ask(harness)).client.data == newer


async def test_directives_on_several_lines_all_count(harness: Harness) -> None:
    fields = [("cache-control", "max-age=60"), ("cache-control", "no-store")]
    body = {"model": MODEL, "messages": [], "temperature": 0}
    assert word(await harness.run(harness.call(body, headers=fields))) == "bypass"


async def test_directive_that_is_no_number_is_passed_over(harness: Harness) -> None:
    assert word(await ask(harness, headers={"cache-control": "max-age=\u00b2"})) == "miss"


async def test_max_age_takes_no_older_answer(harness: Harness) -> None:
    await ask(harness)
    harness.clock.turn(20)
    assert word(await ask(harness, headers={"cache-control": "max-age=30"})) == "hit"
    assert word(await ask(harness, headers={"cache-control": "max-age=10"})) == "miss"


@pytest.mark.parametrize(
    "pieces",
    [
        EVENTS,  # no end
        [*EVENTS[:1], b'data: {"error":{"message":"overloaded","code":"x"}}\n\n', DONE],
    ],
    ids=["no-end", "error-event"],
)
async def test_stream_that_is_no_whole_answer_is_not_kept(
    harness: Harness, pieces: Sequence[bytes]
) -> None:
    assert word(await stream(harness, *pieces)) == "miss"
    assert word(await stream(harness, *EVENTS, DONE)) == "miss"


async def test_stream_that_broke_off_is_not_kept(harness: Harness) -> None:
    harness.upstream.answer = harness.upstream.stream(EVENTS[0])
    run = harness.start(asking(harness, stream=True))
    await run.begun()
    harness.upstream.source.feed(*EVENTS[1:], DONE)
    harness.upstream.source.fail()
    await run.ended()
    assert run.client.error is not None
    assert word(await stream(harness, *EVENTS, DONE)) == "miss"


async def test_answer_that_is_too_long_is_not_kept_and_passes_whole() -> None:
    async with caching(max_entry_bytes=1500) as harness:
        long = [*EVENTS[:2], *[EVENTS[1]] * 40, DONE]
        for _ in range(2):
            run = await stream(harness, *long)
            assert (word(run), run.client.data) == ("miss", b"".join(long))
        assert harness.value("llm_sidecar_cache_entries", backend="memory") == 0


async def test_compressed_answer_is_not_kept(harness: Harness) -> None:
    harness.upstream.answer = harness.upstream.stream(b"\x1f\x8b", encoding="gzip")
    for _ in range(2):
        run = harness.start(asking(harness, stream=True))
        await run.begun()
        harness.upstream.source.finish()
        await run.ended()
        assert word(run) == "miss"


# Refusals


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_refusal_that_will_not_change_is_kept_for_a_while(
    harness: Harness, status: int
) -> None:
    error = b'{"error":{"code":"invalid_value","message":"no","type":"invalid_request_error"}}'
    harness.upstream.answer = harness.upstream.whole(error, status=status)
    first, second = await ask(harness), await ask(harness)
    assert [word(first), word(second)] == ["miss", "hit"]
    assert (second.client.status, second.client.data) == (status, error)
    harness.clock.turn(61)
    assert word(await ask(harness)) == "miss"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "Arrearage"),
        (400, "insufficient_quota"),
        (400, "2003"),
        (401, "invalid_api_key"),
        (403, "forbidden"),
        (408, "timeout"),
        (429, "rate_limit_exceeded"),
        (500, "internal_error"),
        (503, "overloaded"),
    ],
)
async def test_refusal_that_may_pass_is_not_kept(harness: Harness, status: int, code: str) -> None:
    error = orjson.dumps({"error": {"code": code, "message": "no"}})
    harness.upstream.answer = harness.upstream.whole(error, status=status)
    assert [word(await ask(harness)) for _ in range(2)] == ["miss", "miss"]


async def test_refusals_are_not_kept_if_told() -> None:
    async with caching(negative_ttl_s=0) as harness:
        harness.upstream.answer = harness.upstream.whole(b'{"error":{}}', status=400)
        assert [word(await ask(harness)) for _ in range(2)] == ["miss", "miss"]


@pytest.mark.parametrize(
    "fields",
    [{"metadata": {"x": 1}}, {"user": "me"}, {"stream": True}],
    ids=str,
)
async def test_refusal_answers_only_the_very_same_request(
    harness: Harness, fields: dict[str, Any]
) -> None:
    harness.upstream.answer = harness.upstream.whole(b'{"error":{}}', status=400)
    await ask(harness, **fields)
    harness.upstream.answer = harness.upstream.whole(ANSWER)
    good = await ask(harness)
    assert (word(good), good.client.status) == ("miss", 200)


async def test_refusal_for_a_header_answers_only_requests_with_that_header(
    harness: Harness,
) -> None:
    harness.upstream.answer = harness.upstream.whole(b'{"error":{}}', status=400)
    await ask(harness, headers={"content-type": "text/plain"})
    harness.upstream.answer = harness.upstream.whole(ANSWER)
    assert (await ask(harness)).client.status == 200


# Time and room


async def test_answer_is_forgotten_within_ttl_and_never_before_the_jitter() -> None:
    async with caching(ttl_s=100, ttl_jitter_s=40) as harness:
        harness.upstream.answer = harness.upstream.whole(ANSWER)
        for number in range(30):
            await ask(harness, str(number))
        harness.clock.turn(59.9)
        assert [word(await ask(harness, str(n))) for n in range(30)] == ["hit"] * 30
        harness.clock.turn(20)
        words = [word(await ask(harness, str(n))) for n in range(30)]
        assert {"hit", "miss"} == set(words)  # about a half: 1 of 10^8 runs has all the same
        harness.clock.turn(100.1)
        assert [word(await ask(harness, str(n))) for n in range(30)] == ["miss"] * 30


@pytest.mark.parametrize(
    "settings",
    [
        {"ttl_s": 10, "ttl_jitter_s": 10},
        {"max_bytes": 10, "max_entry_bytes": 20},
        {"bloom": True},
        {"ignore_headers": ["a b"]},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Cache.Config.model_validate(settings)


# Purge


@pytest.mark.parametrize(
    ("what", "left"),
    [("all", 0), ({"model": MODEL}, 0), ({"team": "tests"}, 0), ({"team": "others"}, 1)],
    ids=str,
)
async def test_operator_has_answers_forgotten(harness: Harness, what: Any, left: int) -> None:
    await ask(harness)
    panel = harness.resources.of_kind("panel")["cache"]
    assert await panel.act({"purge": what}) == {"purged": 1 - left}
    assert word(await ask(harness)) == ("hit" if left else "miss")


async def test_one_answer_is_forgotten_by_the_key_in_its_header(harness: Harness) -> None:
    run = await ask(harness)
    await ask(harness, "Something else")
    panel = harness.resources.of_kind("panel")["cache"]
    key = run.client.headers["x-sidecar-cache-key"]
    assert await panel.act({"purge": {"key": key}}) == {"purged": 1}
    assert word(await ask(harness)) == "miss"
    assert word(await ask(harness, "Something else")) == "hit"


@pytest.mark.parametrize(
    "command",
    [
        {},
        {"purge": "some"},
        {"purge": {}},
        {"purge": {"id": "x"}},
        {"purge": {"key": ""}},
        {"x": 1},
    ],
    ids=str,
)
async def test_wrong_command_is_told_what_is_right(
    harness: Harness, command: dict[str, Any]
) -> None:
    panel = harness.resources.of_kind("panel")["cache"]
    with pytest.raises(ValueError, match="write"):
        await panel.act(command)


async def test_panel_shows_the_stores(harness: Harness) -> None:
    await ask(harness)
    kept, refusals = await harness.resources.of_kind("panel")["cache"].show()
    assert (kept["backend"], kept["entries"]) == ("memory", 1)
    assert kept["bytes"] > len(ANSWER)
    assert refusals == {"backend": "refusals", "entries": 0, "bytes": 0}


async def test_failure_is_passed_on_and_not_kept(harness: Harness) -> None:
    harness.upstream.answer = harness.upstream.failing(broken(Phase.CONNECT))
    run = await ask(harness)
    assert (run.client.status, word(run)) == (502, "miss")
    harness.upstream.answer = harness.upstream.whole(ANSWER)
    assert word(await ask(harness)) == "miss"


async def test_messages_are_replayed_byte_for_byte() -> None:
    upstream = FakeUpstream(dialect=ANTHROPIC)
    data = (
        b'event: message_start\r\ndata: {"type":"message_start","message":{"usage":'
        b'{"input_tokens":8,"output_tokens":1}}}\r\n\r\n'
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":7}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    async with caching(upstream) as harness:
        call = asking(harness, stream=True, path="/v1/messages")
        first = await stream(harness, data[:70], data[70:], call=call)
        second = await ask(harness, stream=True, path="/v1/messages")
        assert (word(first), word(second)) == ("miss", "hit")
        assert first.client.data == second.client.data == data
        assert second.call[USAGE] == Usage(8, 7)
