"""What `sign` does with several keys, tokens and clocks, and what it learns from answers."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import orjson
import pytest

from filters.algo.key_pool import KeyPool
from filters.sign import Sign
from filters.signers import answers as answers_module
from filters.signers.answers import DEFAULT_REST_S
from filters.signers.settings import SignSettings
from filters.stores.tokens import NEW_S
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    Fetched,
    FilterConfig,
    Rejected,
    Reply,
    Secret,
    Timeouts,
)
from sidecar.call import Outcome, Target
from sidecar.headers import Headers
from sidecar.reply import Body
from tests.support.flow import until
from tests.support.harness import (
    FakeFetcher,
    FakeUpstream,
    Harness,
    ScriptedSource,
    Sent,
    Use,
)

PATH = "/v1/chat/completions"


def use(**values: Any) -> Use:
    settings = SignSettings.variant(values).model_validate(values)
    return Use(Sign, {}, {"fake": settings})


def pool(*keys: str, **more: Any) -> Use:
    entries = [{"key": Secret(f"sk-{key}", f"env:{key.upper()}")} for key in keys]
    return use(scheme="bearer", pool=entries, **more)


def amazon() -> Use:
    return use(
        scheme="AWS4-HMAC-SHA256",
        access_key_id=Secret("AKIDEXAMPLE"),
        secret_access_key=Secret("secret-access-key"),
        region="us-east-1",
    )


def baidu(*names: str) -> Use:
    keys = [{"client_id": Secret(f"id-{name}"), "client_secret": Secret(name)} for name in names]
    more: dict[str, Any] = keys[0] if len(keys) == 1 else {"pool": keys}
    return use(scheme="baidu-oauth", **more)


Answering = Callable[[Attempt], Awaitable[Reply]]


def answers(*scripts: tuple[int, dict[str, str], bytes]) -> Answering:
    """One answer after the other; the last one again and again."""
    left = list(scripts)

    async def answer(attempt: Attempt) -> Reply:
        status, headers, data = left.pop(0) if len(left) > 1 else left[0]
        fields = {"content-type": "application/json", **headers}
        media_type, encoding = fields["content-type"], fields.get("content-encoding", "")
        body = Body(media_type=media_type, encoding=encoding, length=len(data))
        body.feed(data)
        body.finish()
        return Reply(status, Headers(fields), body)

    return answer


def key_of(sent: Sent) -> str:
    return sent.headers["authorization"].removeprefix("Bearer ").removeprefix("sk-")


async def calls(harness: Harness, count: int) -> list[Sent]:
    """What `count` calls made reach the upstream."""
    before = len(harness.upstream.sent)
    for _ in range(count):
        await harness.run()
    return harness.upstream.sent[before:]


def metric(harness: Harness, name: str) -> dict[tuple[str, ...], float]:
    """The values of one metric by its labels' values."""
    for family in harness.metrics.snapshot():
        if family["name"] == name:
            return {tuple(labels): value for labels, value in family["samples"]}
    return {}


# Several keys


async def test_keys_of_a_pool_take_turns() -> None:
    async with Harness(pool("one", "two", "three")) as harness:
        assert [key_of(each) for each in await calls(harness, 4)] == ["one", "two", "three", "one"]


async def test_retry_takes_the_next_key() -> None:
    class Twice(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            return await call_next(call)

    async with Harness(Twice, pool("one", "two")) as harness:
        await harness.run()
        assert [key_of(each) for each in harness.upstream.sent] == ["one", "two"]


@pytest.mark.parametrize("status", [401, 403])
async def test_key_that_is_refused_is_set_aside_and_reported(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with Harness(pool("one", "two", "three")) as harness:
        harness.upstream.answer = answers((status, {}, b"{}"), (200, {}, b"{}"))
        with caplog.at_level(logging.INFO):
            sent = await calls(harness, 5)
        assert [key_of(each) for each in sent] == ["one", "two", "three", "two", "three"]
        (record,) = caplog.records
        assert (record.getMessage(), record.key, record.status) == (  # type: ignore[attr-defined]
            "key_refused",
            "env:ONE",
            status,
        )
        assert "sk-one" not in str(vars(record))
        found = metric(harness, "llm_sidecar_key_refusals")
        assert found == {("fake", "1", str(status)): 1}


async def test_key_that_was_set_aside_is_tried_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(pool("one", "two", set_aside_s=60.0)) as harness:
        harness.upstream.answer = answers((401, {}, b"{}"), (200, {}, b"{}"))
        await calls(harness, 2)
        caplog.clear()
        harness.clock.turn(60.0)
        with caplog.at_level(logging.INFO):
            sent = await calls(harness, 2)
        assert sorted(key_of(each) for each in sent) == ["one", "two"]
        assert [record.getMessage() for record in caplog.records] == ["key_accepted_again"]


@pytest.mark.parametrize(
    ("headers", "rest_s"),
    [({"retry-after": "7"}, 7.0), ({"retry-after-ms": "2500"}, 2.5), ({}, DEFAULT_REST_S)],
)
async def test_key_that_is_limited_rests_for_its_retry_after(
    headers: dict[str, str], rest_s: float
) -> None:
    async with Harness(pool("one", "two")) as harness:
        harness.upstream.answer = answers((429, headers, b"{}"), (200, {}, b"{}"))
        assert [key_of(each) for each in await calls(harness, 3)] == ["one", "two", "two"]
        harness.clock.turn(rest_s - 0.1)
        assert [key_of(each) for each in await calls(harness, 1)] == ["two"]
        harness.clock.turn(0.1)
        assert sorted(key_of(each) for each in await calls(harness, 2)) == ["one", "two"]


async def test_when_every_key_rests_the_call_is_told_how_long() -> None:
    async with Harness(pool("one", "two")) as harness:
        harness.upstream.answer = answers(
            (429, {"retry-after": "30"}, b"{}"), (429, {"retry-after": "12"}, b"{}")
        )
        await calls(harness, 2)
        run = await harness.run()
        assert len(harness.upstream.sent) == 2
        assert run.client.status == 429
        assert run.client.headers["retry-after"] == "12"
        assert run.client.headers["x-sidecar-error"] == "upstream_keys_resting"
        assert run.call.end is not None
        assert run.call.end.outcome is Outcome.UPSTREAM_FAILED
        assert not run.call.end.upstream_fault


async def test_only_key_never_rests_and_is_reported_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = {"scheme": "bearer", "key": Secret("one", "env:ONE")}
    async with Harness(use(**values)) as harness:
        harness.upstream.answer = answers((429, {"retry-after": "60"}, b"{}"), (401, {}, b"{}"))
        with caplog.at_level(logging.INFO):
            assert len(await calls(harness, 3)) == 3
        assert [record.getMessage() for record in caplog.records] == ["key_rests", "key_refused"]


@pytest.mark.parametrize("status", [200, 400, 404, 500, 503, 529])
async def test_other_answers_say_nothing_of_the_key(status: int) -> None:
    async with Harness(pool("one", "two")) as harness:
        harness.upstream.answer = answers((status, {}, b"{}"))
        assert [key_of(each) for each in await calls(harness, 4)] == ["one", "two"] * 2


async def test_state_of_a_key_is_shared_by_all_chains_of_a_process() -> None:
    async with Harness(pool("one", "two"), pool("one", "two")) as harness:
        first, second = (each for each in harness.filters if isinstance(each, Sign))
        assert first._signers["fake"]._pool is second._signers["fake"]._pool
        assert isinstance(first._signers["fake"]._pool, KeyPool)


# The clock


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (403, {}, b'{"message":"Signature expired: 20231114T221320Z is now earlier than ..."}'),
        (400, {"x-amzn-errortype": "RequestExpired:http://internal/"}, b"{}"),
    ],
)
async def test_clock_offset_is_learned_from_an_answer_that_says_expired(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    async with Harness(amazon()) as harness:
        date = {"date": "Tue, 14 Nov 2023 22:30:00 GMT"}  # the fake clock says 22:13:20
        harness.upstream.answer = answers((status, {**headers, **date}, body), (200, {}, b"{}"))
        first, second = await calls(harness, 2)
        assert first.headers["x-amz-date"] == "20231114T221320Z"
        assert second.headers["x-amz-date"] == "20231114T223000Z"
        assert metric(harness, "llm_sidecar_clock_corrections") == {("fake",): 1}
        assert metric(harness, "llm_sidecar_key_refusals") == {}


async def test_clock_offset_is_found_in_a_compressed_answer() -> None:
    async with Harness(amazon()) as harness:
        headers = {"date": "Tue, 14 Nov 2023 22:30:00 GMT", "content-encoding": "gzip"}
        body = gzip.compress(b'{"message":"Signature expired: ..."}')
        harness.upstream.answer = answers((403, headers, body), (200, {}, b"{}"))
        _, second = await calls(harness, 2)
        assert second.headers["x-amz-date"] == "20231114T223000Z"


def tencent() -> Use:
    return use(
        scheme="TC3-HMAC-SHA256",
        secret_id=Secret("AKIDsecretid"),
        secret_key=Secret("secret-key"),
        service="hunyuan",
        action="ChatCompletions",
        version="2023-09-01",
    )


@pytest.mark.parametrize(
    ("body", "is_off"),
    [
        (b'{"Response":{"Error":{"Code":"AuthFailure.SignatureExpire","Message":""}}}', True),
        (b'{"Response":{"Content":"it said \\"Code\\":\\"AuthFailure.SignatureExpire\\""}}', False),
        (b'{"Response":{"Content":"AuthFailure.SignatureExpire means that"}}', False),
    ],
)
async def test_clock_offset_is_learned_from_a_200_that_is_an_error_and_from_no_model_s_words(
    body: bytes, is_off: bool
) -> None:
    async with Harness(tencent()) as harness:
        date = {"date": "Tue, 14 Nov 2023 22:30:00 GMT"}
        harness.upstream.answer = answers((200, date, body))
        await harness.run()
        corrections = metric(harness, "llm_sidecar_clock_corrections")
        assert corrections == {("fake",): int(is_off)}


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (403, {"date": "Tue, 14 Nov 2023 22:30:00 GMT"}, b'{"message":"no access"}'),
        (403, {}, b"Signature expired"),
        (403, {"date": "soon"}, b"Signature expired"),
        (503, {"date": "Tue, 14 Nov 2023 22:30:00 GMT"}, b"{}"),
    ],
)
async def test_other_answers_do_not_move_the_clock(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    async with Harness(amazon()) as harness:
        harness.upstream.answer = answers((status, headers, body), (200, {}, b"{}"))
        _, second = await calls(harness, 2)
        assert second.headers["x-amz-date"] == "20231114T221320Z"


async def test_every_attempt_is_signed_with_its_own_time() -> None:
    async with Harness(amazon()) as harness:
        await harness.run()
        harness.clock.turn(1.0)
        await harness.run()
        first, second = harness.upstream.sent
        assert first.headers["authorization"] != second.headers["authorization"]
        assert second.headers["x-amz-date"] == "20231114T221321Z"


async def test_token_made_here_is_kept_until_it_is_nearly_over() -> None:
    key = Secret("0123456789abcdef0123456789abcdef.FakeSecret000001")
    async with Harness(use(scheme="zhipu-jwt-hs256", api_key=key)) as harness:
        tokens = []
        for turn_s in (0.0, 179.0, 2.0):
            harness.clock.turn(turn_s)
            tokens += [key_of(each) for each in await calls(harness, 1)]
        assert tokens[0] == tokens[1] != tokens[2]


# Tokens that are fetched


def token(value: str, life_s: int = 2_592_000) -> bytes:
    return orjson.dumps({"access_token": value, "expires_in": life_s})


async def test_token_is_fetched_once_and_put_on_every_attempt() -> None:
    async with Harness(baidu("secret-one")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        sent = await calls(harness, 3)
        assert [each.path for each in sent] == [f"{PATH}?access_token=token-1"] * 3
        assert len(harness.fetcher.asked) == 1
        assert metric(harness, "llm_sidecar_token_fetches") == {("fake", "ok"): 1}


async def test_call_without_a_token_fails_and_says_so_without_a_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(baidu("secret-one")) as harness:
        harness.fetcher.answering(401, b'{"error":"invalid_client","error_description":"unknown"}')
        with caplog.at_level(logging.INFO):
            run = await harness.run()
        assert (run.client.status, run.client.headers["x-sidecar-error"]) == (
            502,
            "upstream_token_failed",
        )
        assert harness.upstream.sent == []
        assert "token_fetch_failed" in caplog.text
        assert "secret-one" not in caplog.text + run.client.data.decode()
        assert metric(harness, "llm_sidecar_token_fetches") == {("fake", "failed"): 1}


@pytest.mark.parametrize("code", [110, 111])
async def test_token_that_the_provider_refuses_within_a_200_is_fetched_anew(code: int) -> None:
    async with Harness(baidu("secret-one")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        await harness.run()
        harness.clock.turn(NEW_S)
        harness.fetcher.answering(200, token("token-2"))
        body = orjson.dumps({"error_code": code, "error_msg": "Access token invalid"})
        harness.upstream.answer = answers((200, {}, body), (200, {}, b"{}"))
        sent = await calls(harness, 2)
        assert [each.path[-7:] for each in sent] == ["token-1", "token-2"]


async def test_401_with_an_old_token_fetches_a_new_one_and_blames_no_key() -> None:
    async with Harness(baidu("secret-one", "secret-two")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        await calls(harness, 2)
        harness.clock.turn(NEW_S)
        harness.upstream.answer = answers((401, {}, b"{}"), (200, {}, b"{}"))
        await calls(harness, 3)
        assert len(harness.fetcher.asked) == 3
        assert metric(harness, "llm_sidecar_key_refusals") == {}


async def test_401_with_a_fresh_token_sets_its_key_aside() -> None:
    async with Harness(baidu("secret-one", "secret-two")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        harness.upstream.answer = answers((401, {}, b"{}"), (200, {}, b"{}"))
        await calls(harness, 4)
        found = metric(harness, "llm_sidecar_key_refusals")
        assert found == {("fake", "1", "401"): 1}
        assert len(harness.fetcher.asked) == 2


async def test_clock_offset_is_learned_from_a_token_s_address_too() -> None:
    signing = use(
        scheme="volcengine-ark",
        access_key_id=Secret("access-key-id"),
        secret_access_key=Secret("secret-access-key"),
        resource_ids=["ep-1"],
    )
    async with Harness(signing) as harness:
        expired = b'{"ResponseMetadata":{"Error":{"Code":"InvalidTimestamp","Message":"expired"}}}'
        harness.fetcher.answering(400, expired, "Tue, 14 Nov 2023 22:30:00 GMT")
        await harness.run()
        harness.clock.turn(1.0)
        await harness.run()
        first, second = (headers["X-Date"] for _, _, headers, _ in harness.fetcher.asked)
        assert (first, second) == ("20231114T221320Z", "20231114T223001Z")


# What it refuses


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_that_would_show_a_key_in_the_url_is_no_answer(status: int) -> None:
    signing = use(scheme="query", key=Secret("sk-canary"), name="key")
    async with Harness(signing) as harness:
        location = {"location": "https://elsewhere.test/?key=sk-canary"}
        harness.upstream.answer = answers((status, location, b"moved to ?key=sk-canary"))
        run = await harness.run()
        assert run.client.status == 502
        assert run.client.headers["x-sidecar-error"] == "upstream_redirects"
        assert "sk-canary" not in f"{run.client.headers} {run.client.data!r}"


async def test_redirect_to_a_key_in_a_header_passes_as_it_is() -> None:
    async with Harness(pool("one", "two")) as harness:
        location = {"location": "https://elsewhere.test/"}
        harness.upstream.answer = answers((307, location, b"moved"))
        run = await harness.run()
        assert (run.client.status, run.client.headers["location"]) == (307, location["location"])


@pytest.mark.parametrize(
    ("host", "scheme"),
    [("evil.test", "https"), ("fake.test", "http"), ("fake.test:8443", "https")],
)
@pytest.mark.parametrize("which", ["always", "each"])
async def test_credentials_go_to_their_own_origin_alone(host: str, scheme: str, which: str) -> None:
    other = FakeUpstream("fake")
    other.host, other.scheme = host, scheme

    class Elsewhere(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            call.target = Target(other)
            return await call_next(call)

    signing = pool("one") if which == "each" else use(scheme="bearer", key=Secret("one"))
    async with Harness(Elsewhere, signing) as harness:
        run = await harness.run()
    assert other.sent == []
    assert run.client.headers["x-sidecar-error"] == "upstream_origin_mismatch"


async def test_request_that_lacks_what_the_scheme_signs_is_refused_with_the_fix() -> None:
    signing = use(
        scheme="ACS3-HMAC-SHA256",
        access_key_id=Secret("access-key-id"),
        access_key_secret=Secret("access-key-secret"),
    )
    async with Harness(signing) as harness:
        run = await harness.run()
        assert run.client.status == 400
        assert run.client.headers["x-sidecar-error"] == "cannot_sign"
        assert "action" in run.client.data.decode()


async def test_only_key_that_is_accepted_again_is_reported_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(use(scheme="bearer", key=Secret("one", "env:ONE"))) as harness:
        harness.upstream.answer = answers((401, {}, b"{}"), (401, {}, b"{}"), (200, {}, b"{}"))
        with caplog.at_level(logging.INFO):
            await calls(harness, 4)
        events = [record.getMessage() for record in caplog.records]
        assert events == ["key_refused", "key_accepted_again"]
        assert metric(harness, "llm_sidecar_key_refusals") == {("fake", "1", "401"): 2}


async def test_answer_that_says_expired_at_our_own_time_blames_the_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(amazon()) as harness:
        date = {"date": "Tue, 14 Nov 2023 22:13:21 GMT"}
        harness.upstream.answer = answers((403, date, b"Signature expired"))
        await calls(harness, 2)
        assert [record.getMessage() for record in caplog.records] == ["key_refused"]
        assert metric(harness, "llm_sidecar_clock_corrections") == {("fake",): 0}


# Several at once, and late


async def test_answers_that_say_expired_at_once_blame_no_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = {"scheme": "AWS4-HMAC-SHA256", "region": "us-east-1"}
    keys = [
        {"access_key_id": Secret(f"AKID{name}"), "secret_access_key": Secret(f"secret-{name}")}
        for name in ("one", "two")
    ]
    async with Harness(use(**values, pool=keys)) as harness:
        go = asyncio.Event()
        date = {"date": "Tue, 14 Nov 2023 22:30:00 GMT"}
        expired = answers((403, date, b"Signature expired"))

        async def late(attempt: Attempt) -> Reply:
            await go.wait()
            return await expired(attempt)

        harness.upstream.answer = late
        runs = [harness.start() for _ in range(4)]
        await until(lambda: len(harness.upstream.sent) == 4)
        go.set()
        for run in runs:
            await run.ended()
        assert [record.getMessage() for record in caplog.records] == ["clock_offset_learned"]
        harness.upstream.answer = answers((200, {}, b"{}"))
        dates = {each.headers["x-amz-date"] for each in await calls(harness, 4)}
        assert dates == {"20231114T223000Z"}


async def test_late_answer_to_an_older_attempt_does_not_bring_a_refused_key_back() -> None:
    async with Harness(pool("one", "two")) as harness:
        go = asyncio.Event()
        good = answers((200, {}, b"{}"))

        async def late(attempt: Attempt) -> Reply:
            await go.wait()
            return await good(attempt)

        harness.upstream.answer = late
        old = harness.start()
        await until(lambda: harness.upstream.sent)
        harness.clock.turn(1.0)
        harness.upstream.answer = answers((200, {}, b"{}"), (401, {}, b"{}"), (200, {}, b"{}"))
        await calls(harness, 2)  # the second one is refused: it is the old one's key again
        go.set()
        await old.ended()
        assert {key_of(each) for each in await calls(harness, 4)} == {"two"}


@pytest.mark.parametrize("status", [301, 400, 404, 413, 500])
async def test_only_a_good_answer_brings_a_key_back(status: int) -> None:
    async with Harness(pool("one", "two", set_aside_s=60.0)) as harness:
        harness.upstream.answer = answers((401, {}, b"{}"), (status, {}, b"{}"))
        await calls(harness, 2)
        harness.clock.turn(60.0)
        probed = [key_of(each) for each in await calls(harness, 4)]
        assert probed.count("one") == 1


async def test_refusal_of_ours_says_nothing_of_the_key(caplog: pytest.LogCaptureFixture) -> None:
    class Refuses(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            (await call_next(attempt)).discard()
            raise Rejected(403, "a_filter_says_no", "no")

    async with Harness(Refuses, use(scheme="bearer", key=Secret("one"))) as harness:
        with caplog.at_level(logging.INFO):
            await harness.run()
        assert caplog.records == []


async def test_wait_until_a_date_is_measured_by_the_clock_of_whoever_wrote_it() -> None:
    async with Harness(pool("one", "two")) as harness:
        headers = {
            "date": "Tue, 14 Nov 2023 23:00:00 GMT",
            "retry-after": "Tue, 14 Nov 2023 23:00:10 GMT",
        }
        harness.upstream.answer = answers((429, headers, b"{}"), (200, {}, b"{}"))
        await calls(harness, 1)
        harness.clock.turn(10.0)
        assert sorted(key_of(each) for each in await calls(harness, 2)) == ["one", "two"]


# Refusals that come in pieces, or in disguise


async def test_code_of_a_refusal_is_found_when_it_comes_in_pieces() -> None:
    async with Harness(amazon()) as harness:
        headers = Headers({"date": "Tue, 14 Nov 2023 22:30:00 GMT"})

        async def in_pieces(attempt: Attempt) -> Reply:
            source = harness.upstream.source = ScriptedSource(media_type="application/json")
            source.feed(b'{"message":"Signature exp')
            return Reply(403, headers, source.body)

        harness.upstream.answer = in_pieces
        run = harness.start()
        await until(lambda: "resume" in harness.upstream.source.asked)
        harness.upstream.source.finish(b'ired"}')
        await run.ended()
        assert run.client.data == b'{"message":"Signature expired"}'
        assert metric(harness, "llm_sidecar_clock_corrections") == {("fake",): 1}


async def test_refusal_whose_rest_does_not_come_passes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers_module, "LOOKED_FOR_S", 0.01)
    async with Harness(amazon()) as harness:
        harness.upstream.answer = harness.upstream.stream(b'{"mess', status=403)
        run = harness.start()
        await run.begun()
        harness.upstream.source.finish(b'age":""}')
        await run.ended()
        assert (run.client.status, run.client.data) == (403, b'{"message":""}')


@pytest.mark.parametrize(
    ("accepted", "sent"),
    [("br, gzip, zstd", "gzip"), ("br", "identity"), ("identity", "identity"), (None, None)],
)
async def test_refusals_are_asked_for_in_a_coding_that_can_be_read(
    accepted: str | None, sent: str | None
) -> None:
    async with Harness(amazon()) as harness:
        headers = (("accept-encoding", accepted),) if accepted is not None else ()
        await harness.run(harness.call(headers=headers))
        (attempt,) = harness.upstream.sent
        assert attempt.headers.get("accept-encoding") == sent


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"Response":{"Error":{"Code":"AuthFailure.SecretIdNotFound","Message":""}}}', "401"),
        (b'{"Response":{"Error":{"Code":"RequestLimitExceeded","Message":""}}}', "429"),
        (b'{"Response": {"Error": {"Message": "", "Code": "LimitExceeded"}}}', "429"),
        (b'{"Response":{"Error":{"Code":"InvalidParameterValue.Model","Message":""}}}', None),
        (b'{"Response":{"Choices":[{"Content":"\\"Error\\":{\\"Code\\":\\"AuthFailure"}]}}', None),
    ],
)
async def test_error_of_tencent_within_a_200_counts_as_what_it_is(
    body: bytes, status: str | None
) -> None:
    async with Harness(tencent()) as harness:
        harness.upstream.answer = answers((200, {}, body))
        await harness.run()
        found = metric(harness, "llm_sidecar_key_refusals")
        assert found == ({} if status is None else {("fake", "1", status): 1})


@pytest.mark.parametrize(
    ("code", "status"), [(18, "429"), (336501, "429"), (14, "401"), (180, None), (336003, None)]
)
async def test_error_of_qianfan_within_a_200_counts_as_what_it_is(
    code: int, status: str | None
) -> None:
    async with Harness(baidu("secret-one")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        harness.upstream.answer = answers((200, {}, orjson.dumps({"error_code": code})))
        await harness.run()
        found = metric(harness, "llm_sidecar_key_refusals")
        assert found == ({} if status is None else {("fake", "1", status): 1})


# Tokens and their neighbours


async def test_key_whose_exchange_fails_leaves_the_calls_to_its_neighbours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(baidu("secret-one", "secret-two")) as harness:

        async def answer() -> Fetched:
            _, url, _, _ = harness.fetcher.asked[-1]
            if "secret-two" in url:
                return Fetched(401, b'{"error":"invalid_client"}')
            return Fetched(200, token("token-1"))

        harness.fetcher.answer = answer
        for _ in range(6):
            assert (await harness.run()).client.status == 200
        failures = [each for each in caplog.records if each.getMessage() == "token_fetch_failed"]
        assert [each.number for each in failures] == [2]  # type: ignore[attr-defined]


async def test_when_no_key_has_a_token_the_call_fails() -> None:
    async with Harness(baidu("secret-one", "secret-two")) as harness:
        run = await harness.run()
        assert run.client.headers["x-sidecar-error"] == "upstream_token_failed"
        assert len(harness.fetcher.asked) == 2


async def test_one_refused_call_does_not_keep_others_from_the_token() -> None:
    async with Harness(baidu("secret-one")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        harness.upstream.answer = answers((403, {}, b"{}"), (401, {}, b"{}"), (200, {}, b"{}"))
        statuses = [(await harness.run()).client.status for _ in range(4)]
        assert statuses == [403, 401, 200, 200]
        assert len(harness.fetcher.asked) == 1


async def test_token_that_is_waited_for_too_long_ends_the_attempt_in_time() -> None:
    async with Harness(baidu("secret-one")) as harness:

        async def never() -> Fetched:
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        harness.fetcher.answer = never
        harness.upstream.timeouts = Timeouts(total_s=0.01)
        run = await harness.run()
        assert (run.client.status, run.client.headers["x-sidecar-error"]) == (
            504,
            "upstream_token_failed",
        )
        await harness.resources.close()


async def test_token_is_not_waited_for_beyond_the_callers_deadline() -> None:
    async with Harness(baidu("secret-one")) as harness:

        async def never() -> Fetched:
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        harness.fetcher.answer = never
        run = await harness.run(harness.call(headers=[("x-request-timeout", "0.01")]))
        assert (run.client.status, run.client.headers["x-sidecar-error"]) == (
            504,
            "deadline_exceeded",
        )
        assert run.call.end is not None
        assert run.call.end.outcome is Outcome.REJECTED
        await harness.resources.close()


async def test_mistake_of_ours_in_an_exchange_is_logged_and_pauses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Harness(baidu("secret-one")) as harness:

        async def breaks() -> Fetched:
            raise KeyError("a bug")

        harness.fetcher.answer = breaks
        for _ in range(3):
            assert (await harness.run()).client.status == 502
        assert len(harness.fetcher.asked) == 1
        events = [record.getMessage() for record in caplog.records]
        assert events == ["token_fetch_broke", "token_fetch_failed"]
        assert metric(harness, "llm_sidecar_token_fetches") == {("fake", "failed"): 1}


async def test_life_of_a_token_is_read_by_the_clock_of_its_provider() -> None:
    signing = use(
        scheme="bce-bearer",
        access_key_id=Secret("access-key-id"),
        secret_access_key=Secret("secret-access-key"),
    )
    async with Harness(signing) as harness:  # our clock says 22:13:20, theirs an hour less
        harness.fetcher.answering(
            400, b'{"code":"RequestExpired"}', "Tue, 14 Nov 2023 21:13:20 GMT"
        )
        await harness.run()
        harness.clock.turn(1.0)
        harness.fetcher.answering(201, b'{"token":"t","expireTime":"2023-11-14T21:43:21Z"}')
        assert (await harness.run()).client.status == 200


async def test_tokens_stay_when_a_key_is_added_to_their_pool() -> None:
    async with Harness(baidu("secret-one", "secret-two")) as harness:
        harness.fetcher.answering(200, token("token-1"))
        await calls(harness, 2)
        more = harness._make(baidu("secret-one", "secret-two", "secret-three"))
        assert isinstance(more, Sign)
        tokens = [key.tokens for key in more._signers["fake"]._keys]
        assert [each is not None and each._token is not None for each in tokens] == [
            True,
            True,
            False,
        ]


async def test_configuration_that_was_only_built_fetches_no_token() -> None:
    other = FakeFetcher()
    async with Harness(baidu("secret-one")) as harness:
        harness.fetcher.answering(200, token("token-1", life_s=100))
        await calls(harness, 1)
        live, harness.fetcher = harness.fetcher, other
        harness._make(baidu("secret-one"))  # and never started
        harness.clock.turn(100.0)
        await calls(harness, 1)
        assert (len(live.asked), len(other.asked)) == (2, 0)


# Tokens that are made here


async def test_token_made_here_is_made_anew_once_the_clock_is_known_to_be_off() -> None:
    key = Secret("0123456789abcdef0123456789abcdef.FakeSecret000001")
    signing = use(scheme="zhipu-jwt-hs256", api_key=key)
    async with Harness(signing, signing) as harness:
        first, second = (each for each in harness.filters if isinstance(each, Sign))
        await calls(harness, 1)
        assert second._signers["fake"]._offset is first._signers["fake"]._offset
        date = {"date": "Tue, 14 Nov 2023 22:03:20 GMT"}
        harness.upstream.answer = answers((401, date, b'{"error":{"code":"1003"}}'), (200, {}, b""))
        one, two = await calls(harness, 2)
        assert key_of(one) != key_of(two)


# Where it is known


async def test_what_is_known_of_keys_and_clock_is_known_of_one_origin() -> None:
    async with Harness(amazon()) as harness:
        date = {"date": "Tue, 14 Nov 2023 22:30:00 GMT"}
        harness.upstream.answer = answers((403, date, b"Signature expired"))
        await harness.run()
        (sign,) = harness.filters
        assert isinstance(sign, Sign)
        kit = replace(sign.kit, origins={"fake": ("https", "elsewhere.test")})
        moved = Sign(FilterConfig(), kit)
        assert moved._signers["fake"]._offset.seconds == 0.0
        assert sign._signers["fake"]._offset.seconds == 1000.0


async def test_header_that_repeats_a_key_in_the_url_does_not_reach_the_client() -> None:
    signing = use(scheme="query", key=Secret("sk-canary/1"), name="key")
    async with Harness(signing) as harness:
        headers = {
            "location": "https://fake.test/v1/files/1?key=sk-canary%2F1",
            "x-upload-url": "https://fake.test/upload?id=1&key=sk-canary/1",
            "x-request-id": "1",
        }
        harness.upstream.answer = answers((201, headers, b"{}"))
        run = await harness.run()
        assert run.client.status == 201
        assert run.client.headers == {"content-type": "application/json", "x-request-id": "1"}


async def test_answer_not_modified_is_no_redirect() -> None:
    async with Harness(use(scheme="query", key=Secret("sk-canary"), name="key")) as harness:
        harness.upstream.answer = answers((304, {}, b""))
        assert (await harness.run()).client.status == 304


@pytest.mark.parametrize(
    ("query", "sent"),
    [("", ""), ("alt=sse", "?alt=sse"), ("key=dummy&alt=sse&k%65y=d", "?alt=sse"), ("key=d", "")],
)
async def test_google_s_other_place_for_a_key_is_emptied(query: str, sent: str) -> None:
    async with Harness(use(scheme="x-goog-api-key", key=Secret("sk-canary"))) as harness:
        await harness.run(harness.call(query=query))
        (attempt,) = harness.upstream.sent
        assert attempt.path == f"{PATH}{sent}"
        assert attempt.headers["x-goog-api-key"] == "sk-canary"


async def test_answer_is_given_up_when_reading_it_fails() -> None:
    async with Harness(amazon()) as harness:
        harness.upstream.answer = harness.upstream.stream(b'{"mess', status=403)
        with mock.patch.object(answers_module, "_refusal", side_effect=KeyError("a bug")):
            run = await harness.run()
        assert run.client.status == 500
        assert harness.upstream.source.is_aborted
