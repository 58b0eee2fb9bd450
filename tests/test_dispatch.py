"""From a call to its attempts: what goes upstream, what never does; every try is pristine."""

from __future__ import annotations

import asyncio
import contextlib

import orjson
import pytest

from sidecar import call as call_module
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
    Phase,
    Rejected,
    Reply,
    Retry,
    Target,
    Timeouts,
    UpstreamError,
)
from sidecar.call import End
from sidecar.dialects import ANTHROPIC, OPENAI
from sidecar.dispatch import Dispatch
from sidecar.team import Models, Patterns, Team
from tests.support.harness import MODEL, FakeClock, FakeUpstream, Harness, Sent

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


class ReadsBeginnings(CallFilter):
    reads_beginnings = True

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        return await call_next(call)


async def test_only_encodings_that_can_be_read_are_asked_for_when_a_filter_reads_beginnings() -> (
    None
):
    for accepted, asked in (("br, gzip", "gzip"), ("zstd, br", "identity"), ("*", "identity")):
        got = await sent(ReadsBeginnings, headers=[("Accept-Encoding", accepted)])
        assert got.headers == {"accept-encoding": asked}
    assert (await sent(ReadsBeginnings)).headers == {}


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


class Hedges(CallFilter):
    """Asks twice at the same time; returns the answer to the second."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        first, second = [asyncio.ensure_future(call_next(call)) for _ in range(2)]
        (await first).discard()
        return await second


async def test_time_that_two_attempts_wait_at_once_counts_once() -> None:
    async def answer(attempt: Attempt) -> Reply:
        if attempt.number == 1:
            await harness.clock.sleep(10.0)
            attempt.first_byte_at = harness.clock.monotonic()
        else:
            harness.clock.turn(4.0)
            harness.clock.turn(6.0)  # and the first is over, too
            attempt.first_byte_at = attempt.started_at + 4.0
        return Reply.of(200, b"{}")

    async with Harness(Hedges) as harness:
        harness.upstream.answer = answer
        run = await harness.run()
    assert run.call.attempts == 2
    assert run.call.upstream_wait_s == pytest.approx(10.0)


async def test_attempt_that_fails_while_another_waits_is_no_wait_of_its_own() -> None:
    class Hopes(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            first, second = [asyncio.ensure_future(call_next(call)) for _ in range(2)]
            with pytest.raises(UpstreamError):
                await second
            return await first

    async def answer(attempt: Attempt) -> Reply:
        if attempt.number == 1:
            await harness.clock.sleep(7.0)
            return Reply.of(200, b"{}")
        harness.clock.turn(3.0)
        harness.clock.turn(4.0)
        return await harness.upstream.failing()(attempt)

    async with Harness(Hopes) as harness:
        harness.upstream.answer = answer
        run = await harness.run()
    assert run.client.status == 200
    assert run.call.upstream_wait_s == pytest.approx(7.0)


class SlowUpload:
    """A body whose client takes 30 s to send it, or breaks it off after them."""

    def __init__(self, clock: FakeClock, error: Rejected | None = None) -> None:
        self._clock = clock
        self._error = error

    async def readany(self) -> bytes:
        raise AssertionError("nobody streams it")

    async def hold(self) -> bytes:
        self._clock.turn(30.0)
        if self._error is not None:
            raise self._error
        return b"audio"


class Holds(AttemptFilter):
    """Needs the whole body, as some signatures do."""

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        assert await attempt.hold_body() == b"audio"
        return await call_next(attempt)


@pytest.mark.parametrize("error", [None, Rejected(413, "body_too_large", "too large")])
async def test_time_that_the_client_takes_for_its_body_is_no_wait_for_the_upstream(
    error: Rejected | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[float] = []

    async def answer(attempt: Attempt) -> Reply:
        started.append(attempt.started_at)
        harness.clock.turn(2.0)
        return Reply.of(200, b"{}")

    async with Harness(Holds) as harness:
        monkeypatch.setattr(call_module, "monotonic", harness.clock.monotonic)
        harness.upstream.answer = answer
        call = harness.call(BODY)
        call.body, call.upload = None, SlowUpload(harness.clock, error)
        run = await harness.run(call)
    if error is None:
        assert run.call.upstream_wait_s == pytest.approx(2.0)
        assert started == [call.received_at + 30.0]
        assert harness.upstream.sent[0].body == b"audio"
    else:
        assert run.client.status == 413
        assert run.call.upstream_wait_s == 0.0


# The caller's deadline


async def test_call_whose_deadline_has_passed_is_refused_and_nobody_is_asked() -> None:
    class Dawdles(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            harness.clock.turn(2.0)
            return await call_next(call)

    ends: list[End] = []
    async with Harness(Dawdles, ends_of(ends)) as harness:
        run = await harness.run(harness.call(BODY, headers=[("x-request-timeout", "2")]))
    error = run.client.error
    assert error is not None
    assert (run.client.status, error.code) == (504, "deadline_exceeded")
    assert (run.call.attempts, harness.upstream.sent, ends) == (0, [], [])
    assert run.call.end is not None
    assert run.call.end.outcome is Outcome.REJECTED
    assert run.call.upstream_wait_s == 0.0


async def test_call_that_is_tried_again_past_its_deadline_makes_no_further_attempt() -> None:
    class Again(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            for _ in range(3):
                with contextlib.suppress(UpstreamError):
                    return await call_next(call)
            raise AssertionError("the deadline ends it")

    async def answer(attempt: Attempt) -> Reply:
        harness.clock.turn(1.0)
        return await harness.upstream.failing()(attempt)

    async with Harness(Again) as harness:
        harness.upstream.answer = answer
        run = await harness.run(harness.call(BODY, headers=[("x-request-timeout", "1.5")]))
    assert (run.client.status, run.call.attempts) == (504, 2)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/fake/x"])
async def test_malformed_timeout_is_refused_before_an_upstream_is_asked(path: str) -> None:
    dialect = ANTHROPIC if path == "/v1/messages" else OPENAI
    async with Harness(upstream=FakeUpstream(dialect=dialect)) as harness:
        headers = [("x-request-timeout", "soon")]
        run = await harness.run(harness.call(BODY, path=path, headers=headers))
    assert run.client.headers["x-sidecar-error"] == "invalid_timeout"
    assert run.client.status == 400
    error = orjson.loads(run.client.data)["error"]
    assert (error["code"], error["type"]) == ("invalid_timeout", "invalid_request_error")
    assert harness.upstream.sent == []


async def test_timeout_header_goes_on_to_the_upstream_as_it_came() -> None:
    assert (await sent(headers=[("X-Request-Timeout", "9")])).headers == {"x-request-timeout": "9"}


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


async def test_attempt_that_was_held_back_is_no_attempt() -> None:
    class HoldsBackOnce(AttemptFilter):
        has_held = False

        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            if not self.has_held:
                self.has_held = True
                raise UpstreamError(Phase.ADMIT, Retry.ELSEWHERE, "circuit_open", "not now")
            return await call_next(attempt)

    class Again(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            try:
                return await call_next(call)
            except UpstreamError:
                assert call.attempts == 0
                return await call_next(call)

    async with Harness(Again, HoldsBackOnce) as harness:
        run = await harness.run(harness.call(BODY))
    assert (run.client.status, run.call.attempts) == (200, 1)


@pytest.mark.parametrize("is_awaited", [False, True])
async def test_gate_of_keys_is_asked_when_no_filter_has(is_awaited: bool) -> None:
    asked: list[str] = []
    waits_s = [0.0, 3.0]

    class Gates(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            attempt.key_gate = self.answer_later if is_awaited else self.answer
            return await call_next(attempt)

        def answer(self, key: str) -> float:
            asked.append(key)
            return waits_s.pop(0)

        async def answer_later(self, key: str) -> float:
            return self.answer(key)

    async with Harness(Gates) as harness:
        assert (await harness.run(harness.call(BODY))).client.status == 200
        refused = await harness.run(harness.call(BODY))
        assert (refused.client.status, refused.client.headers["retry-after"]) == (429, "3")
        assert refused.client.headers["x-sidecar-error"] == "upstream_limit_reached"
        assert (asked, len(harness.upstream.sent)) == (["", ""], 1)
