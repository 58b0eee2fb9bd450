"""From a call to its attempts: what goes upstream, what never does; every try is pristine."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    Event,
    Filter,
    Outcome,
    Rejected,
    Reply,
    Target,
    Timeouts,
    UpstreamError,
)
from sidecar.call import End
from sidecar.dialects import ANTHROPIC
from sidecar.dispatch import Dispatch
from sidecar.team import Models, Patterns, Team
from tests.support.harness import MODEL, FakeUpstream, Harness, Sent

BODY = b'{"model": "gpt-4o-mini",  "messages": [], "unknown_field": 1.50}'


async def sent(
    *filters: type[Filter], headers: list[tuple[str, str]] | None = None, body: bytes = BODY
) -> Sent:
    """What reaches the upstream of a call with these headers."""
    async with Harness(*filters) as harness:
        run = await harness.run(harness.call(body, headers=headers or []))
        assert run.client.status == 200
        (only,) = harness.upstream.sent
        return only


# What goes upstream


async def test_body_that_nobody_changed_goes_up_as_it_came() -> None:
    assert (await sent()).body == BODY


async def test_end_to_end_headers_pass_in_order_with_lower_case_names() -> None:
    got = await sent(headers=[("X-B", "2"), ("Content-Type", "application/json"), ("x-a", "é")])
    assert list(got.headers.items()) == [
        ("x-b", "2"),
        ("content-type", "application/json"),
        ("x-a", "é"),
    ]


CREDENTIALS = ["Authorization", "x-api-key", "Api-Key", "X-Goog-Api-Key", "Cookie"]
HOP_BY_HOP = [
    *("Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection"),
    *("TE", "Trailer", "Transfer-Encoding", "Upgrade"),
]
REWRITTEN = ["Host", "Content-Length", "Expect"]


@pytest.mark.parametrize("name", [*CREDENTIALS, *HOP_BY_HOP, *REWRITTEN])
async def test_header_is_never_sent_on(name: str) -> None:
    got = await sent(headers=[(name, "canary"), ("x-kept", "1"), (name.upper(), "canary")])
    assert got.headers == {"x-kept": "1"}


@pytest.mark.parametrize(
    "value", ["x-private, X-Other", "close,X-Private ,x-other", "x-private,,x-other"]
)
async def test_headers_that_connection_names_are_never_sent_on(value: str) -> None:
    headers = [("Connection", value), ("X-Private", "1"), ("x-other", "2"), ("x-kept", "3")]
    assert (await sent(headers=headers)).headers == {"x-kept": "3"}


async def test_several_connection_headers_count_together() -> None:
    headers = [("connection", "x-a"), ("Connection", "x-b"), ("x-a", "1"), ("x-b", "2")]
    assert (await sent(headers=headers)).headers == {}


async def test_accepted_encodings_pass_while_no_filter_looks_at_events() -> None:
    headers = [("Accept-Encoding", "gzip, br")]
    assert (await sent(headers=headers)).headers == {"accept-encoding": "gzip, br"}
    assert (await sent()).headers == {}


class LooksAtEvents(CallFilter):
    taps_events = True

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        return await call_next(call)


async def test_uncompressed_answer_is_asked_for_when_a_filter_looks_at_events() -> None:
    headers = [("Accept-Encoding", "gzip, br")]
    got = await sent(LooksAtEvents, headers=headers)
    assert got.headers == {"accept-encoding": "identity"}
    assert (await sent(LooksAtEvents)).headers == {"accept-encoding": "identity"}


async def test_headers_of_filters_and_upstream_stand_over_the_clients() -> None:
    class Adds(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.set_upstream_header("X-A", "filter")
            call.set_upstream_header("X-B", "filter")
            return await call_next(call)

    upstream = FakeUpstream()
    upstream.extra_headers = {"x-b": "upstream", "x-c": "upstream"}
    async with Harness(Adds, upstream=upstream) as harness:
        await harness.run(harness.call(BODY, headers=[("x-a", "client"), ("X-C", "client")]))
        (got,) = upstream.sent
    assert got.headers == {"x-a": "filter", "x-b": "upstream", "x-c": "upstream"}


@pytest.mark.parametrize(
    ("path", "query", "base_path", "wire"),
    [
        ("/v1/chat/completions", "", "/v1", "/v1/chat/completions"),
        ("/v1/chat/completions", "", "", "/v1/chat/completions"),
        ("/v1/chat/completions", "a=1&b=%20", "/api/v3", "/api/v3/chat/completions?a=1&b=%20"),
        ("/v1/embeddings", "", "/compatible-mode/v1", "/compatible-mode/v1/embeddings"),
        ("/fake/files/a%2Fb", "x=1", "/v1", "/v1/files/a%2Fb?x=1"),
        ("/fake", "", "", "/"),
        ("/fake", "", "/v1", "/v1"),
        ("/fake/", "", "", "/"),
    ],
)
async def test_path_on_the_wire(path: str, query: str, base_path: str, wire: str) -> None:
    upstream = FakeUpstream()
    upstream.base_path = base_path
    async with Harness(upstream=upstream) as harness:
        await harness.run(harness.call(BODY, path=path, query=query))
    assert [each.path for each in upstream.sent] == [wire]


async def test_path_on_the_wire_of_anthropic() -> None:
    upstream = FakeUpstream(dialect=ANTHROPIC)
    upstream.base_path = "/proxy"
    async with Harness(upstream=upstream) as harness:
        await harness.run(harness.call(BODY, path="/v1/messages", query="beta=true"))
    assert [each.path for each in upstream.sent] == ["/proxy/v1/messages?beta=true"]


# Models and targets


def to(model: str | None) -> type[CallFilter]:
    class Routes(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.target = Target(call.targets[0].upstream, model)
            return await call_next(call)

    return Routes


async def test_model_is_renamed_and_every_other_field_kept() -> None:
    got = await sent(to("qwen-max"))
    assert orjson.loads(got.body) == {**orjson.loads(BODY), "model": "qwen-max"}


@pytest.mark.parametrize("model", [None, MODEL])
async def test_model_of_the_same_name_leaves_the_bytes_alone(model: str | None) -> None:
    assert (await sent(to(model))).body == BODY


async def test_renaming_is_for_the_attempt_and_not_for_the_call() -> None:
    async with Harness(to("qwen-max")) as harness:
        run = await harness.run(harness.call(BODY))
    assert run.call.body == BODY
    assert run.call.json["model"] == run.call.model == MODEL


async def test_filter_chooses_the_target_and_without_one_it_is_the_first() -> None:
    one, two = FakeUpstream("one"), FakeUpstream("two")

    class Second(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            call.target = call.targets[1]
            return await call_next(call)

    async with Harness(Second) as harness:
        call = harness.call(BODY)
        call.targets = (Target(one), Target(two))
        await harness.run(call)
    assert (len(one.sent), len(two.sent)) == (1, 1)


async def test_model_of_another_dialect_is_refused_with_the_paths_to_call() -> None:
    async with Harness(upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        run = await harness.run(harness.call(BODY))
    error = run.client.error
    assert error is not None
    assert (error.status, error.code) == (400, "wrong_dialect")
    assert "anthropic" in error.message
    assert "/v1/messages" in error.message
    assert harness.upstream.sent == []


async def test_call_without_a_target_is_refused() -> None:
    async with Harness() as harness:
        call = harness.call(BODY)
        call.targets = ()
        run = await harness.run(call)
    assert run.client.error is not None
    assert (run.client.status, run.client.error.code) == (404, "model_not_found")


# Every try is pristine


class Spoils(AttemptFilter):
    """Changes everything that an attempt lets it change."""

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        if attempt.number == 1:
            attempt.headers["x-a"] = "spoiled"
            attempt.headers.add("x-new", "spoiled")
            del attempt.headers["x-b"]
            attempt.body = b"spoiled"
            attempt.path = "/spoiled"
            attempt.method = "PUT"
            attempt.timeouts = Timeouts(connect_s=0.1)
        return await call_next(attempt)


@pytest.mark.parametrize("fails", [False, True])
async def test_second_attempt_knows_nothing_of_the_first(fails: bool) -> None:
    class Again(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            try:
                reply = await call_next(call)
            except UpstreamError:
                harness.upstream.answer = harness.upstream.whole(b"{}")
            else:
                reply.discard()
            return await call_next(call)

    class Keeps(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            numbers.append((attempt.number, attempt.timeouts))
            return await call_next(attempt)

    numbers: list[tuple[int, Timeouts]] = []
    headers = [("X-A", "1"), ("x-b", "2")]
    async with Harness(Again, Keeps, Spoils) as harness:
        if fails:
            harness.upstream.answer = harness.upstream.failing()
        run = await harness.run(harness.call(BODY, headers=headers, query="q=1"))
        first, second = harness.upstream.sent
    assert (first.method, first.path, first.body) == ("PUT", "/spoiled", b"spoiled")
    assert first.headers == {"x-a": "spoiled", "x-new": "spoiled"}
    assert second == Sent("POST", "/v1/chat/completions?q=1", {"x-a": "1", "x-b": "2"}, BODY)
    assert numbers == [(1, Timeouts()), (2, Timeouts())]
    assert run.call.attempts == 2
    assert dict(run.call.headers) == {"X-A": "1", "x-b": "2"}


async def test_filter_sets_the_timeouts_of_the_next_attempts() -> None:
    seen: list[Timeouts] = []

    class Hurries(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.timeouts = Timeouts(first_byte_s=1.0)
            return await call_next(call)

    class Keeps(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            seen.append(attempt.timeouts)
            return await call_next(attempt)

    async with Harness(Hurries, Keeps) as harness:
        await harness.run(harness.call(BODY))
    assert seen == [Timeouts(first_byte_s=1.0)]


# Ends of attempts


def ends_of(ends: list[End]) -> type[AttemptFilter]:
    class Ends(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            attempt.on_end(ends.append)
            return await call_next(attempt)

    return Ends


async def test_attempt_ends_when_its_body_does() -> None:
    ends: list[End] = []
    async with Harness(ends_of(ends)) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n", status=201)
        run = harness.start()
        await run.begun()
        assert ends == []
        harness.upstream.source.finish()
        await run.ended()
    (end,) = ends
    assert (end.outcome, end.status) == (Outcome.COMPLETED, 201)


async def test_each_attempt_of_a_call_has_its_own_end() -> None:
    class Again(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            harness.upstream.answer = harness.upstream.failing()
            return await call_next(call)

    ends: list[End] = []
    async with Harness(Again, ends_of(ends)) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n")
        run = await harness.run()
    assert [end.outcome for end in ends] == [Outcome.DISCARDED, Outcome.UPSTREAM_FAILED]
    assert run.call.end is not None
    assert run.call.end.outcome is Outcome.UPSTREAM_FAILED


async def test_attempt_that_a_filter_gives_up_is_discarded_and_no_fault() -> None:
    class Hurries(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            waiting = asyncio.ensure_future(call_next(call))
            await harness.upstream.asked.wait()
            waiting.cancel()
            await asyncio.wait((waiting,))
            return Reply.of(200, b'{"late": true}')

    ends: list[End] = []
    async with Harness(Hurries, ends_of(ends)) as harness:
        harness.upstream.answer = harness.upstream.silent()
        run = await harness.run()
    (end,) = ends
    assert end.outcome is Outcome.DISCARDED
    assert not end.upstream_fault
    assert run.client.status == 200


async def test_taps_of_attempt_filters_see_events() -> None:
    seen: list[bytes] = []

    class Taps(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            reply = await call_next(attempt)

            def look(event: Event) -> None:
                seen.append(event.data)

            reply.body.tap_events(look)
            return reply

    async with Harness(Taps) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n")
        run = harness.start()
        await run.begun()
        harness.upstream.source.finish(b"data: 2\n\n")
        await run.ended()
    assert seen == [b"1", b"2"]


async def test_time_spent_waiting_for_upstreams_adds_up() -> None:
    async def answer(attempt: Attempt) -> Reply:
        attempt.first_byte_at = attempt.started_at + 3.0
        return Reply.of(200, b"{}")

    class Twice(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            return await call_next(call)

    async with Harness(Twice) as harness:
        harness.upstream.answer = answer
        run = await harness.run()
    assert run.call.upstream_wait_s == pytest.approx(6.0)


# The models endpoint

NAMES = {"gpt-4o": (), "org/model": (), "claude-x": (), "qwen-*": ()}


async def models(path: str, team: tuple[str, ...] = ("*",), **headers: str) -> Reply:
    harness = Harness(team=Team("t", "normal", Patterns(team), frozenset()))
    dispatch = Dispatch(models=Models(NAMES), taps_events=False)
    call = harness.call(b"", method="GET", path=path)
    if headers:
        call.dialect = ANTHROPIC
    return await dispatch(call)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/"])
async def test_models_endpoint_lists_the_names_the_team_may_use(path: str) -> None:
    reply = await models(path, ("gpt-*", "org/model"))
    listed = orjson.loads(reply.body.take())
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["gpt-4o", "org/model"]
    assert {each["object"] for each in listed["data"]} == {"model"}


async def test_models_endpoint_answers_in_the_dialect_of_the_client() -> None:
    listed = orjson.loads((await models("/v1/models", anthropic_version="x")).body.take())
    assert [each["id"] for each in listed["data"]] == ["gpt-4o", "org/model", "claude-x"]
    assert (listed["first_id"], listed["last_id"]) == ("gpt-4o", "claude-x")
    assert listed["has_more"] is False
    one = orjson.loads((await models("/v1/models/gpt-4o", anthropic_version="x")).body.take())
    assert (one["type"], one["id"]) == ("model", "gpt-4o")


@pytest.mark.parametrize("path", ["/v1/models/org/model", "/v1/models/org%2Fmodel"])
async def test_models_endpoint_finds_a_name_that_the_sdk_percent_encodes(path: str) -> None:
    assert orjson.loads((await models(path)).body.take())["id"] == "org/model"


@pytest.mark.parametrize("path", ["/v1/models/nope", "/v1/models/claude-x"])
async def test_models_endpoint_knows_nothing_that_the_team_may_not_use(path: str) -> None:
    with pytest.raises(Rejected) as raised:
        await models(path, ("gpt-*",))
    assert (raised.value.status, raised.value.code) == (404, "model_not_found")
