"""Questions that mean the same share an answer; whatever else differs, they do not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from math import cos, pi, sin
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from filters.priority_queue import PriorityQueue
from filters.semantic_cache import SemanticCache
from filters.token_counter import TokenCounter
from sidecar.api import (
    CACHED,
    LOST_USAGE,
    SIDE_CALLS,
    USAGE,
    Attempt,
    Call,
    Outcome,
    Phase,
    Reply,
    SideCall,
    Target,
    Usage,
)
from sidecar.dialects import ANTHROPIC
from tests.support.harness import MODEL, PATIENCE_S, Answer, FakeUpstream, Harness, Run, Use, broken

ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1760000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "By train."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    }
)
EVENTS = [
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"By train."},'
    b'"finish_reason":null}]}\n\n',
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]
TOOK = Usage(12, 3)

ASKED = "How do I get there?"
ALIKE = "How can I get there?"
NEAR = "Which way is it?"
OTHER = "What does it cost?"
ANGLES = {
    ASKED: 0.0,
    ALIKE: 10.0,
    "Where is it?": 13.0,
    NEAR: 20.0,
    OTHER: 90.0,
    "Is 5 enough?": 0.0,
    "Is 7 enough?": 0.0,
    "Are 5 enough?": 0.0,
}
"""In degrees: 10 are a cosine of 0.985, 20 of 0.940."""


def vector(text: str) -> list[float]:
    angle = ANGLES.get(text, 180.0) * pi / 180
    return [3 * cos(angle), 3 * sin(angle), 0.0]


def embedded(numbers: object, **changes: Any) -> bytes:
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": numbers}],
        "model": "embed-1",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    return orjson.dumps({**answer, **changes})


class Embeddings(FakeUpstream):
    """An upstream that knows what the questions mean."""

    def __init__(self, name: str = "vectors") -> None:
        super().__init__(name)
        self.answer = self.by_meaning()

    async def read_on(self) -> None:
        """Return once somebody takes the rest of an answer that has begun."""
        await self.asked.wait()
        async with asyncio.timeout(PATIENCE_S):
            while "resume" not in self.source.asked:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)

    def by_meaning(self) -> Answer:
        async def answer(attempt: Attempt) -> Reply:
            return Reply.of(200, embedded(vector(orjson.loads(attempt.body)["input"])))

        return answer


class Ground:
    """A chain with the filter, its upstreams, and calls to it."""

    def __init__(self, *around: Any, upstream: FakeUpstream | None = None, **settings: Any) -> None:
        self.vectors = Embeddings()
        use = Use(SemanticCache, {"embedding_model": "embed", **settings})
        self.harness = Harness(
            TokenCounter,
            use,
            *around,
            upstream=upstream,
            models={"embed": (Target(self.vectors, "embed-1"),)},
        )
        upstream = self.harness.upstream
        upstream.answer = upstream.whole(ANSWER)

    @property
    def sent(self) -> int:
        """Calls that asked for an answer."""
        return len(self.harness.upstream.sent)

    @property
    def asked(self) -> list[str]:
        """Texts whose embedding was asked for."""
        return [orjson.loads(each.body)["input"] for each in self.vectors.sent]

    def call(
        self,
        text: str = ASKED,
        *,
        headers: Mapping[str, str] | None = None,
        path: str = "/v1/chat/completions",
        **fields: Any,
    ) -> Call:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0}
        return self.harness.call({**body, **fields}, headers=(headers or {}).items(), path=path)

    async def ask(self, *args: Any, **kwargs: Any) -> Run:
        return await self.harness.run(self.call(*args, **kwargs))

    async def stream(self, text: str = ASKED, *pieces: bytes, **fields: Any) -> Run:
        """A call whose stream comes in these pieces."""
        upstream = self.harness.upstream
        before = upstream.answer
        pieces = pieces or tuple(EVENTS)
        upstream.answer = upstream.stream(pieces[0])
        run = self.harness.start(self.call(text, stream=True, **fields))
        await run.begun()
        upstream.source.feed(*pieces[1:])
        upstream.source.finish()
        await run.ended()
        upstream.answer = before
        return run

    def counts(self) -> dict[str, int]:
        words = ("hit", "miss", "bypass", "late", "failed")
        value = self.harness.value
        counted = {
            word: value("llm_sidecar_semantic_cache", team="tests", result=word) for word in words
        }
        return {word: int(count) for word, count in counted.items() if count}

    async def purge(self, what: Any) -> Any:
        panel = self.harness.resources.of_kind("panel")["semantic_cache"]
        return await panel.act({"purge": what})


@pytest.fixture
async def ground() -> AsyncIterator[Ground]:
    ground = Ground()
    async with ground.harness:
        yield ground


def word(run: Run) -> str | None:
    return run.client.headers.get("x-sidecar-cache")


def similarity(run: Run) -> str | None:
    return run.client.headers.get("x-sidecar-cache-similarity")


# Hits


async def test_question_that_means_the_same_is_a_hit_and_the_same_bytes(ground: Ground) -> None:
    first, second = await ground.ask(ASKED), await ground.ask(ALIKE)
    assert (word(first), word(second)) == ("miss", "hit")
    assert first.client.data == second.client.data == ANSWER
    assert (similarity(first), similarity(second)) == (None, "0.985")
    assert second.client.headers["age"] == "0"
    assert second.client.headers["content-type"] == "application/json"
    assert ground.sent == 1
    assert ground.asked == [ASKED, ALIKE]
    assert ground.counts() == {"miss": 1, "hit": 1}


async def test_question_that_means_something_else_is_not(ground: Ground) -> None:
    await ground.ask(ASKED)
    assert word(await ground.ask(OTHER)) == "miss"
    assert word(await ground.ask(NEAR)) == "miss"
    assert ground.sent == 3


@pytest.mark.parametrize(("threshold", "found"), [(0.93, "hit"), (0.95, "miss"), (1.0, "miss")])
async def test_threshold_decides(threshold: float, found: str) -> None:
    ground = Ground(threshold=threshold)
    async with ground.harness:
        await ground.ask(ASKED)
        assert word(await ground.ask(NEAR)) == found
        assert word(await ground.ask(ASKED)) == "hit"


async def test_nearest_answer_is_given(ground: Ground) -> None:
    upstream = ground.harness.upstream
    for text in (ASKED, NEAR):
        upstream.answer = upstream.whole(ANSWER.replace(b"By train.", text.encode()))
        await ground.ask(text)
    run = await ground.ask("Where is it?")
    assert (word(run), similarity(run)) == ("hit", f"{cos(7 * pi / 180):.3f}")
    assert NEAR.encode() in run.client.data


async def test_usage_of_a_hit_is_there_and_marked_cached(ground: Ground) -> None:
    first, second = await ground.ask(ASKED), await ground.ask(ALIKE)
    assert first.call[USAGE] == second.call[USAGE] == TOOK
    assert CACHED not in first.call
    assert second.call[CACHED] == "hit"
    assert (first.call.attempts, second.call.attempts) == (1, 0)


async def test_embedding_is_accounted_for_on_hit_and_miss(ground: Ground) -> None:
    for text in (ASKED, ALIKE):
        call = (await ground.ask(text)).call
        target = Target(ground.vectors, "embed-1")
        assert call[SIDE_CALLS] == [SideCall(target, "embeddings", Usage(7, 0), "embed")]


async def test_stream_is_replayed_byte_for_byte(ground: Ground) -> None:
    first = await ground.stream(ASKED)
    second = await ground.ask(ALIKE, stream=True)
    assert (word(first), word(second)) == ("miss", "hit")
    assert first.client.data == second.client.data == b"".join(EVENTS)
    assert second.client.headers["content-type"] == "text/event-stream"


async def test_whole_answer_is_made_of_a_recorded_stream_and_the_other_way_round() -> None:
    for streamed_first in (True, False):
        ground = Ground()
        async with ground.harness:
            if streamed_first:
                await ground.stream(ASKED)
            else:
                await ground.ask(ASKED)
            run = await ground.ask(ALIKE, stream=not streamed_first)
            assert word(run) == "hit"
            assert b"By train." in run.client.data
            assert run.client.data.startswith(b"{" if streamed_first else b"data:")


async def test_answer_without_the_form_that_is_asked_for_gives_way_to_the_next(
    ground: Ground,
) -> None:
    odd = EVENTS[0].replace(b'"content"', b'"unheard_of":1,"content"')
    await ground.stream(ASKED, odd, *EVENTS[1:])
    assert word(await ground.ask(ALIKE)) == "miss"  # it has no whole form
    run = await ground.ask(ASKED)
    assert (word(run), similarity(run)) == ("hit", "0.985")


async def test_anthropic_s_messages_share_answers_too() -> None:
    answer = orjson.dumps(
        {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "By train."}]}
    )
    upstream = FakeUpstream(dialect=ANTHROPIC)
    ground = Ground(upstream=upstream)
    upstream.answer = upstream.whole(answer)
    async with ground.harness:
        words = [
            word(await ground.ask(text, path="/v1/messages", max_tokens=9))
            for text in (ASKED, ALIKE, OTHER)
        ]
    assert words == ["miss", "hit", "miss"]
    assert [each.path for each in ground.vectors.sent] == ["/v1/embeddings"] * 3


# What else must be the same


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gpt-4o"},
        {"max_tokens": 5},
        {"seed": 1},
        {"response_format": {"type": "json_object"}},
        {"something_new": 1},
        {"headers": {"openai-beta": "x"}},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": ALIKE},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ALIKE}]}]},
    ],
    ids=str,
)
async def test_all_but_the_question_must_be_the_same(
    ground: Ground, changes: dict[str, Any]
) -> None:
    await ground.ask(ASKED)
    assert word(await ground.ask(ALIKE, **changes)) == "miss"


@pytest.mark.parametrize("fields", [{"user": "x"}, {"metadata": {"trace": "1"}}], ids=str)
async def test_field_that_does_not_change_the_answer_is_left_out(
    ground: Ground, fields: dict[str, Any]
) -> None:
    await ground.ask(ASKED)
    assert word(await ground.ask(ALIKE, **fields)) == "hit"


async def test_question_with_another_number_is_another_question(ground: Ground) -> None:
    await ground.ask("Is 5 enough?")
    assert word(await ground.ask("Is 7 enough?")) == "miss"
    assert word(await ground.ask("Are 5 enough?")) == "hit"


async def test_further_fields_and_headers_are_left_out_if_told() -> None:
    ground = Ground(ignore_fields=["trace"], ignore_headers=["X-Trace"])
    async with ground.harness:
        await ground.ask(ASKED)
        assert word(await ground.ask(ALIKE, trace="1", headers={"x-trace": "2"})) == "hit"


@pytest.mark.parametrize(("scope", "second"), [("team", "hit"), ("all", "hit"), ("key", "miss")])
async def test_scope_says_who_shares(scope: str, second: str) -> None:
    ground = Ground(scope=scope)
    async with ground.harness:
        await ground.ask(ASKED, headers={"authorization": "Bearer one"})
        assert word(await ground.ask(ALIKE, headers={"authorization": "Bearer two"})) == second
        assert word(await ground.ask(ALIKE, headers={"authorization": "Bearer one"})) == "hit"


async def test_answers_to_callers_own_keys_are_never_shared() -> None:
    upstream = FakeUpstream()
    upstream.passes_client_key = True
    ground = Ground(upstream=upstream, scope="all")
    async with ground.harness:
        await ground.ask(ASKED, headers={"authorization": "Bearer one"})
        assert word(await ground.ask(ALIKE, headers={"authorization": "Bearer two"})) == "miss"


async def test_embeddings_by_another_model_are_not_compared(ground: Ground) -> None:
    await ground.ask(ASKED)
    newer = embedded(vector(ALIKE), model="embed-2")
    ground.vectors.answer = ground.vectors.whole(newer)
    assert [word(await ground.ask(ALIKE)) for _ in range(2)] == ["miss", "hit"]


# Calls that are passed by


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"functions": [{"name": "f"}]},
        {"n": 2},
        {"audio": {"voice": "x"}},
        {"temperature": 0.7},
        {"messages": []},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": ASKED},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}},
                    ],
                }
            ]
        },
        {"messages": [{"role": "user", "content": "x" * 2001}]},
    ],
    ids=lambda fields: str(fields)[:60],
)
async def test_call_with_more_than_a_text_is_passed_by(
    ground: Ground, fields: dict[str, Any]
) -> None:
    for _ in range(2):
        run = await ground.ask(**fields)
        assert (word(run), run.client.data) == ("bypass", ANSWER)
    assert ground.asked == []
    assert ground.counts() == {"bypass": 2}


async def test_any_temperature_is_kept_if_told() -> None:
    ground = Ground(any_temperature=True)
    async with ground.harness:
        await ground.ask(ASKED, temperature=1)
        assert word(await ground.ask(ALIKE, temperature=1)) == "hit"


async def test_body_that_names_a_field_twice_is_passed_by(ground: Ground) -> None:
    body = (
        b'{"model":"%b","temperature":0,"messages":[{"role":"user","content":"x"}],'
        b'"messages":[{"role":"user","content":"y"}]}'
    )
    run = await ground.harness.run(ground.harness.call(body % MODEL.encode()))
    assert word(run) == "bypass"


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/responses", "/v1/completions", "/v1/models"]
)
async def test_other_endpoints_pass_untouched(ground: Ground, path: str) -> None:
    run = await ground.ask(path=path, input="x")
    assert word(run) is None
    assert ground.counts() == {}


async def test_no_store_is_neither_answered_nor_kept(ground: Ground) -> None:
    quiet = {"cache-control": "no-store"}
    words = [
        word(await ground.ask(ASKED, headers=quiet)),
        word(await ground.ask(ALIKE)),
        word(await ground.ask(ASKED, headers=quiet)),
    ]
    assert words == ["bypass", "miss", "bypass"]
    assert ground.asked == [ALIKE]


async def test_no_cache_asks_again_and_keeps_the_new_answer(ground: Ground) -> None:
    await ground.ask(ASKED)
    newer = ANSWER.replace(b"By train.", b"On foot.")
    ground.harness.upstream.answer = ground.harness.upstream.whole(newer)
    again = await ground.ask(ASKED, headers={"cache-control": "no-cache"})
    assert (word(again), again.client.data) == ("miss", newer)
    assert (await ground.ask(ALIKE)).client.data == newer


async def test_max_age_takes_no_older_answer(ground: Ground) -> None:
    await ground.ask(ASKED)
    ground.harness.clock.turn(20)
    hit = await ground.ask(ALIKE, headers={"cache-control": "max-age=30"})
    assert (word(hit), hit.client.headers["age"]) == ("hit", "20")
    assert word(await ground.ask(ALIKE, headers={"cache-control": "max-age=10"})) == "miss"


# What is not kept


async def test_answer_is_forgotten_when_its_time_has_come() -> None:
    ground = Ground(ttl_s=100.0, ttl_jitter_s=0.0)
    async with ground.harness:
        await ground.ask(ASKED)
        ground.harness.clock.turn(99)
        assert word(await ground.ask(ALIKE)) == "hit"
        ground.harness.clock.turn(1)
        assert word(await ground.ask(ALIKE)) == "miss"


async def test_answers_are_bounded_and_the_longest_unused_goes_first() -> None:
    ground = Ground(max_entries=2)
    async with ground.harness:
        for text in (ASKED, OTHER, ALIKE, "Something else?"):
            await ground.ask(text)
        value = ground.harness.value
        assert value("llm_sidecar_semantic_cache_entries") == 2
        assert value("llm_sidecar_semantic_cache_evictions") == 1
        assert word(await ground.ask(OTHER)) == "miss"
        assert word(await ground.ask("Something else?")) == "hit"


@pytest.mark.parametrize(
    "pieces",
    [
        EVENTS[:2],
        [EVENTS[0], b'data: {"error":{"message":"overloaded","code":"x"}}\n\n', EVENTS[2]],
    ],
    ids=["no-end", "error-event"],
)
async def test_stream_that_is_no_whole_answer_is_not_kept(
    ground: Ground, pieces: list[bytes]
) -> None:
    await ground.stream(ASKED, *pieces)
    assert word(await ground.ask(ALIKE)) == "miss"


async def test_stream_that_broke_off_is_not_kept_and_gives_its_room_back(ground: Ground) -> None:
    upstream = ground.harness.upstream
    upstream.answer = upstream.stream(EVENTS[0])
    run = ground.harness.start(ground.call(stream=True))
    await run.begun()
    upstream.source.feed(*EVENTS[1:])
    upstream.source.fail()
    await run.ended()
    upstream.answer = upstream.whole(ANSWER)
    assert word(await ground.ask(ALIKE)) == "miss"
    (made,) = [each for each in ground.harness.filters if isinstance(each, SemanticCache)]
    assert made._room.left == made.config.max_bytes


async def test_client_that_leaves_keeps_nothing(ground: Ground) -> None:
    upstream = ground.harness.upstream
    upstream.answer = upstream.stream(EVENTS[0])
    run = ground.harness.start(ground.call(stream=True))
    await run.begun()
    run.client_leaves()
    await run.ended()
    assert ground.harness.value("llm_sidecar_semantic_cache_entries") == 0


async def test_answer_that_is_too_long_is_not_kept_and_passes_whole() -> None:
    ground = Ground(max_entry_bytes=200)
    async with ground.harness:
        first = await ground.stream(ASKED)
        assert first.client.data == b"".join(EVENTS)
        assert word(await ground.ask(ALIKE)) == "miss"
        assert ground.harness.value("llm_sidecar_semantic_cache_entries") == 0


async def test_refusal_is_not_kept(ground: Ground) -> None:
    upstream = ground.harness.upstream
    upstream.answer = upstream.whole(b'{"error":{"message":"no","code":"x"}}', status=400)
    assert (await ground.ask(ASKED)).client.status == 400
    assert word(await ground.ask(ALIKE)) == "miss"


# Embeddings


async def test_embedding_is_asked_of_the_model_s_upstream_with_the_question_alone(
    ground: Ground,
) -> None:
    headers = {
        "authorization": "Bearer team-key",
        "x-trace": "1",
        "traceparent": "00-1",
        "accept": "text/event-stream",
        "idempotency-key": "x",
    }
    messages = [{"role": "system", "content": "Secret."}, {"role": "user", "content": ASKED}]
    await ground.ask(headers=headers, messages=messages)
    (sent,) = ground.vectors.sent
    assert (sent.method, sent.path) == ("POST", "/v1/embeddings")
    assert orjson.loads(sent.body) == {"model": "embed-1", "input": ASKED}
    assert sent.headers == {
        "content-type": "application/json",
        "accept-encoding": "identity",
        "traceparent": "00-1",
    }


async def test_caller_s_own_key_goes_to_an_upstream_that_gets_it(ground: Ground) -> None:
    ground.vectors.passes_client_key = True
    await ground.ask(headers={"authorization": "Bearer own"})
    assert ground.vectors.sent[0].headers["authorization"] == "Bearer own"


BAD = {
    "status": FakeUpstream().whole(b'{"error":{"message":"no"}}', status=500),
    "no-json": FakeUpstream().whole(b"<html>"),
    "no-object": FakeUpstream().whole(b"[]"),
    "no-data": FakeUpstream().whole(b"{}"),
    "two": FakeUpstream().whole(embedded(None, data=[{"embedding": [1.0]}] * 2)),
    "no-item": FakeUpstream().whole(embedded(None, data=["x"])),
    "no-vector": FakeUpstream().whole(embedded(None)),
    "zero": FakeUpstream().whole(embedded([0.0, 0.0])),
    "text": FakeUpstream().whole(embedded(["1.0"])),
    "base64": FakeUpstream().whole(embedded("AACAPwAAAAA=")),
    "too-long": FakeUpstream().whole(embedded([1.0] * 300_000)),
    "refused": FakeUpstream().failing(),
}


@pytest.mark.parametrize("name", BAD)
async def test_call_goes_on_without_an_embedding_that_is_none(ground: Ground, name: str) -> None:
    ground.vectors.answer = BAD[name]
    for count in (1, 2):
        run = await ground.ask(ASKED)
        assert (run.client.status, run.client.data) == (200, ANSWER)
        assert ground.counts() == {"failed": count}
    ground.vectors.answer = ground.vectors.by_meaning()
    assert word(await ground.ask(ASKED)) == "miss"


async def test_compressed_embedding_is_none(ground: Ground) -> None:
    ground.vectors.answer = ground.vectors.stream(
        b"\x1f\x8b", media_type="application/json", encoding="gzip"
    )
    assert (await ground.ask()).client.data == ANSWER
    assert ground.vectors.source.is_aborted
    assert ground.counts() == {"failed": 1}


async def test_embedding_that_comes_in_pieces_is_read(ground: Ground) -> None:
    data = embedded(vector(ASKED))
    ground.vectors.answer = ground.vectors.stream(data[:9], media_type="application/json")
    run = ground.harness.start(ground.call())
    await ground.vectors.read_on()
    ground.vectors.source.feed(data[9:50])
    ground.vectors.source.finish(data[50:])
    await run.ended()
    assert word(run) == "miss"
    assert ground.counts() == {"miss": 1}


async def test_embedding_that_breaks_off_is_the_upstream_s_fault(ground: Ground) -> None:
    ground.vectors.answer = ground.vectors.stream(b'{"data":', media_type="application/json")
    run = ground.harness.start(ground.call())
    await ground.vectors.read_on()
    ground.vectors.source.fail()
    await run.ended()
    assert run.client.data == ANSWER
    assert ground.counts() == {"failed": 1}
    (side,) = run.call[SIDE_CALLS]  # it may be charged
    assert side.usage.is_estimated


async def test_embedding_that_never_ends_is_given_up(ground: Ground) -> None:
    ground.vectors.answer = ground.vectors.stream(b"[", media_type="application/json")
    run = ground.harness.start(ground.call())
    await ground.vectors.read_on()
    for _ in range(17):
        if not ground.vectors.source.is_aborted:
            ground.vectors.source.feed(b"1," * 32 * 1024)
    assert ground.vectors.source.is_aborted
    await run.ended()
    assert run.client.data == ANSWER


@pytest.mark.parametrize("begins", [False, True], ids=["silent", "begun"])
async def test_call_goes_on_without_an_embedding_that_is_late(begins: bool) -> None:
    ground = Ground(timeout_s=0.5)
    vectors = ground.vectors
    vectors.answer = (
        vectors.stream(b'{"data":', media_type="application/json") if begins else vectors.silent()
    )
    async with ground.harness:
        run = ground.harness.start(ground.call())
        await vectors.asked.wait()
        ground.harness.clock.turn(0.4)
        assert not run._begun.done()
        ground.harness.clock.turn(0.1)
        await run.ended()
        assert (run.client.status, run.client.data) == (200, ANSWER)
        assert ground.counts() == {"late": 1}
        assert vectors.source.is_aborted == begins
        (side,) = run.call[SIDE_CALLS]
        assert side.usage.is_estimated
        assert 3 <= side.usage.input <= 9
        assert ground.harness.clock._timers == []


async def test_embedding_that_was_refused_costs_nothing(ground: Ground) -> None:
    ground.vectors.answer = BAD["status"]
    assert SIDE_CALLS not in (await ground.ask()).call
    ground.vectors.answer = ground.vectors.failing(broken(Phase.CONNECT))
    assert SIDE_CALLS not in (await ground.ask()).call


async def test_client_that_leaves_ends_the_embedding_and_it_is_accounted_for(
    ground: Ground,
) -> None:
    ground.vectors.answer = ground.vectors.silent()
    run = ground.harness.start(ground.call())
    await ground.vectors.asked.wait()
    known: list[Any] = []
    run.call.on_end(lambda end: known.append((end.outcome, run.call.get(SIDE_CALLS))))
    run.client_leaves()
    await run.ended()
    ((outcome, sides),) = known
    assert outcome is Outcome.CLIENT_GONE
    assert [each.usage.is_estimated for each in sides] == [True]
    await ground.harness.settled()
    assert ground.sent == 0
    assert ground.harness.clock._timers == []


async def test_trouble_and_its_end_are_logged_once(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ground.vectors.answer = BAD["status"]
    await ground.ask()
    await ground.ask()
    ground.vectors.answer = ground.vectors.by_meaning()
    await ground.ask()
    await ground.ask()
    told = [(each.message, vars(each).get("why")) for each in caplog.records]
    assert told == [("embeddings_fail", "status_500"), ("embeddings_work", None)]


async def test_mistake_of_our_own_is_logged_and_the_call_goes_on(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(attempt: Attempt) -> Reply:
        raise RuntimeError("a mistake")

    ground.vectors.answer = failing
    assert (await ground.ask()).client.data == ANSWER
    assert [each.message for each in caplog.records] == ["task_failed"]
    assert ground.counts() == {"failed": 1}


async def test_usage_that_is_not_reported_is_estimated(ground: Ground) -> None:
    ground.vectors.answer = ground.vectors.whole(embedded(vector(ASKED), usage=None))
    (side,) = (await ground.ask(ASKED)).call[SIDE_CALLS]
    assert side.usage.is_estimated
    assert side.usage.input > 2


async def test_what_was_lost_before_is_not_counted_again(ground: Ground) -> None:
    call = ground.call()
    call[LOST_USAGE] = Usage(100)
    run = await ground.harness.run(call)
    assert [each.usage for each in run.call[SIDE_CALLS]] == [Usage(7, 0)]


async def test_embedding_takes_a_place_in_the_queue_behind_and_gives_it_back() -> None:
    ground = Ground(Use(PriorityQueue, {"max_in_flight": 1}))
    async with ground.harness:
        for text in (ASKED, ALIKE, OTHER):
            await ground.ask(text)
        assert ground.counts() == {"miss": 2, "hit": 1}
        assert ground.harness.value("llm_sidecar_queue_in_flight") == 0


async def test_similarity_of_the_nearest_is_observed(ground: Ground) -> None:
    for text in (ASKED, ALIKE, OTHER):
        await ground.ask(text)
    value = ground.harness.value("llm_sidecar_semantic_cache_similarity", team="tests")
    assert value == 2


# Operators


@pytest.mark.parametrize(
    ("what", "purged"),
    [
        ("all", 1),
        ({"team": "tests"}, 1),
        ({"team": "others"}, 0),
        ({"model": MODEL}, 1),
        ({"model": "other"}, 0),
        ({"key": "0" * 40}, 0),
    ],
    ids=str,
)
async def test_answers_are_forgotten_when_an_operator_asks(
    ground: Ground, what: Any, purged: int
) -> None:
    await ground.ask(ASKED)
    assert await ground.purge(what) == {"purged": purged}
    assert word(await ground.ask(ALIKE)) == ("miss" if purged else "hit")


async def test_wrong_answer_is_forgotten_by_the_key_of_its_hit(ground: Ground) -> None:
    await ground.ask(ASKED)
    await ground.ask(OTHER)
    key = (await ground.ask(ALIKE)).client.headers["x-sidecar-cache-key"]
    assert await ground.purge({"key": key}) == {"purged": 1}
    assert word(await ground.ask(OTHER)) == "hit"
    assert word(await ground.ask(ALIKE)) == "miss"


async def test_panel_shows_what_is_kept(ground: Ground) -> None:
    await ground.ask(ASKED)
    (shown,) = await ground.harness.resources.of_kind("panel")["semantic_cache"].show()
    assert (shown["backend"], shown["entries"]) == ("memory", 1)
    assert shown["bytes"] > 0


# Settings


async def test_model_that_is_not_there_keeps_it_from_starting() -> None:
    harness = Harness(TokenCounter, Use(SemanticCache, {"embedding_model": "nowhere"}))
    with pytest.raises(ValueError, match='"nowhere" is not among `models`'):
        async with harness:
            pass
    await harness.__aexit__(None, None, None)


async def test_model_of_another_dialect_keeps_it_from_starting() -> None:
    upstream = FakeUpstream("claude", ANTHROPIC)
    harness = Harness(
        TokenCounter,
        Use(SemanticCache, {"embedding_model": "embed"}),
        models={"embed": (Target(upstream),)},
    )
    with pytest.raises(ValueError, match="claude speaks anthropic"):
        async with harness:
            pass
    await harness.__aexit__(None, None, None)


async def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "filters.algo.vectors", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    ground = Ground()
    with pytest.raises(RuntimeError, match=r"llm-sidecar\[semantic\]"):
        async with ground.harness:
            pass
    await ground.harness.__aexit__(None, None, None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"embedding_model": "embed", "threshold": 0.0},
        {"embedding_model": "embed", "threshold": 1.1},
        {"embedding_model": "embed", "ttl_s": 10.0, "ttl_jitter_s": 10.0},
        {"embedding_model": "embed", "max_bytes": 10, "max_entry_bytes": 11},
        {"embedding_model": "embed", "max_entries": 10_001},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SemanticCache.Config.model_validate(settings)
