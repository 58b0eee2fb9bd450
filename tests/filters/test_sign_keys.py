"""What `sign` does with several keys, tokens and clocks, and what it learns from answers."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from filters.algo.key_pool import KeyPool
from filters.sign import Sign
from filters.signers.settings import SignSettings
from filters.signers.signer import DEFAULT_REST_S
from filters.stores.tokens import NEW_S
from sidecar.api import Attempt, Call, CallFilter, CallNext, Reply, Secret
from sidecar.call import Outcome, Target
from sidecar.headers import Headers
from sidecar.reply import Body
from tests.support.harness import FakeUpstream, Harness, Sent, Use

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
        with caplog.at_level(logging.WARNING):
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
        with caplog.at_level(logging.WARNING):
            assert len(await calls(harness, 3)) == 3
        assert [record.getMessage() for record in caplog.records] == ["key_refused"]


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
        with caplog.at_level(logging.WARNING):
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


@pytest.mark.parametrize(("host", "scheme"), [("evil.test", "https"), ("fake.test", "http")])
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
