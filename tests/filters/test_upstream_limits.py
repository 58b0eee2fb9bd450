"""An upstream is kept within its limits: configured ones, and those that its answers tell of."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any

import orjson
import pytest

from filters.algo.allowance import FRESH_S, read
from filters.sign import Sign
from filters.signers.settings import SignSettings
from filters.stores.limits import Grant, Refusal
from filters.token_counter import TokenCounter
from filters.upstream_limits import UpstreamLimits
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    Headers,
    Phase,
    Reply,
    Retry,
    Secret,
    UpstreamError,
)
from sidecar.call import Target
from sidecar.chain import link_attempt
from sidecar.dialects import ANTHROPIC
from sidecar.dispatch import Dispatch
from sidecar.team import Models
from tests.support.harness import MODEL, Answer, FakeUpstream, Harness, Run, Use

CODE = "upstream_limit_reached"
PAUSED = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "30s"}


def limits(settings: Mapping[str, Any] | None = None, **config: Any) -> Use:
    section = UpstreamLimits.UpstreamConfig.model_validate(dict(settings or {}))
    return Use(UpstreamLimits, config, {"fake": section})


def key(*keys: str) -> Use:
    """`sign` with one key, or with a pool."""
    values: dict[str, Any] = {"scheme": "bearer", "key": Secret(keys[0])}
    if len(keys) > 1:
        values = {"scheme": "bearer", "pool": [{"key": Secret(each)} for each in keys]}
    return Use(Sign, {}, {"fake": SignSettings.variant(values).model_validate(values)})


def saying(fields: Mapping[str, str], *, status: int = 200, data: bytes = b"{}") -> Answer:
    """An answer with these headers."""

    async def answer(attempt: Attempt) -> Reply:
        reply = Reply.of(status, data)
        reply.headers = Headers({"content-type": "application/json", **fields})
        return reply

    return answer


def keys_used(harness: Harness) -> list[str]:
    return [each.headers["authorization"][-1] for each in harness.upstream.sent]


async def statuses(harness: Harness, count: int) -> list[int]:
    return [(await harness.run()).client.status for _ in range(count)]


async def asleep(harness: Harness) -> None:
    """Return once somebody sleeps."""
    async with asyncio.timeout(5.0):
        while not harness.clock._sleepers:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)


def refused(run: Run) -> UpstreamError:
    error = run.client.error
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.retry, error.code) == (Phase.ADMIT, Retry.ELSEWHERE, CODE)
    assert error.status == 429
    return error


def limited(harness: Harness, rule: str, answer: str = "refused") -> float:
    name = "llm_sidecar_upstream_limited"
    value = harness.value(name, upstream="fake", rule=rule, answer=answer)
    assert isinstance(value, float | int)
    return value


# Configured


async def test_an_upstream_without_a_section_is_passed_untouched() -> None:
    async with Harness(UpstreamLimits) as harness:
        (each,) = harness.filters
        assert isinstance(each, UpstreamLimits)
        passed = object()
        attempt = Dispatch(models=Models({}), taps_events=False)._attempt(
            harness.call(), Target(harness.upstream)
        )
        assert each.handle(attempt, lambda attempt: passed) is passed  # type: ignore[arg-type, return-value]
        assert attempt.key_gate is None


@pytest.mark.parametrize(
    ("setting", "period_s", "words"),
    [
        ("requests_per_second", 1.0, "2 requests a second"),
        ("requests_per_minute", 60.0, "2 requests a minute"),
    ],
)
async def test_an_upstream_that_is_full_sends_its_attempts_elsewhere(
    setting: str, period_s: float, words: str
) -> None:
    async with Harness(limits({setting: 2}, max_wait_s=0.0), key("a")) as harness:
        assert await statuses(harness, 2) == [200, 200]
        run = await harness.run()
        error = refused(run)
        assert error.message == f"the limit of upstream fake is reached: {words}"
        assert error.retry_after_s == pytest.approx(period_s, rel=0.03)
        assert len(harness.upstream.sent) == 2
        assert limited(harness, setting) == 1
        harness.clock.turn(error.retry_after_s or 0.0)
        assert await statuses(harness, 1) == [200]


async def test_a_short_wait_is_waited_for() -> None:
    settings = {"requests_per_second": 2}
    async with Harness(limits(settings, max_wait_s=1.5), key("a")) as harness:
        assert await statuses(harness, 2) == [200, 200]
        run = harness.start()
        await asleep(harness)
        assert len(harness.upstream.sent) == 2
        harness.clock.turn(1.1)
        await run.ended()
        assert run.client.status == 200
        assert limited(harness, "requests_per_second", "waited") == 1


async def test_nobody_waits_longer_than_the_setting_and_then_fails() -> None:
    settings = {"requests_per_second": 1}
    async with Harness(limits(settings, max_wait_s=1.5), key("a")) as harness:
        await harness.run()
        runs = [harness.start() for _ in range(3)]
        for _ in range(3):
            await asleep(harness)
        harness.clock.turn(1.1)  # one of them goes; the others would have to wait another second
        for run in runs:
            await run.ended()
        assert sorted(run.client.status for run in runs) == [200, 429, 429]
        assert not harness.clock._sleepers


async def test_a_wait_that_the_caller_will_not_live_to_see_is_refused_at_once() -> None:
    settings = {"requests_per_second": 1}
    async with Harness(limits(settings, max_wait_s=5.0), key("a")) as harness:
        await harness.run()
        run = await harness.run(harness.call(headers=[("x-request-timeout", "0.5")]))
        refused(run)


async def test_a_client_that_leaves_while_it_waits_takes_nothing() -> None:
    settings = {"requests_per_second": 1, "concurrency": 1}
    async with Harness(limits(settings), key("a")) as harness:
        assert await statuses(harness, 1) == [200]
        harness.clock.turn(0.5)
        run = harness.start()
        await asleep(harness)
        run.client_leaves()
        await run.ended()
        assert not harness.clock._sleepers
        harness.clock.turn(0.6)
        assert await statuses(harness, 1) == [200]


async def test_a_client_that_leaves_while_its_key_waits_gives_everything_back() -> None:
    settings = {"requests_per_minute": 2, "tokens_per_minute": 5000, "concurrency": 1}
    async with Harness(TokenCounter, limits(settings), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED | {"x-ratelimit-reset-requests": "500ms"})
        assert await statuses(harness, 1) == [200]
        for _ in range(3):
            run = harness.start()
            await asleep(harness)
            run.client_leaves()
            await run.ended()
        harness.clock.turn(0.5)
        assert await statuses(harness, 1) == [200]


async def test_an_attempt_holds_its_slot_to_the_end_of_the_stream() -> None:
    async with Harness(limits({"concurrency": 1}), key("a")) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n")
        run = harness.start()
        await run.begun()
        error = refused(await harness.run())
        assert error.message == "the limit of upstream fake is reached: 1 requests at once"
        assert error.retry_after_s == 1.0
        harness.upstream.source.finish()
        await run.ended()
        harness.upstream.answer = harness.upstream.failing()
        assert await statuses(harness, 2) == [502, 502]
        harness.upstream.answer = harness.upstream.whole(b"{}")
        assert await statuses(harness, 1) == [200]


async def test_an_attempt_that_was_never_sent_takes_nothing() -> None:
    async with Harness(limits({"requests_per_minute": 1}, max_wait_s=0.0), key("a")) as harness:
        harness.upstream.answer = harness.upstream.failing()  # to connect
        assert await statuses(harness, 3) == [502] * 3
        harness.upstream.answer = harness.upstream.whole(b"{}", status=500)
        assert await statuses(harness, 2) == [500, 429]


def tokens(tokens_in: int, tokens_out: int) -> bytes:
    return orjson.dumps({"usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}})


def asking(harness: Harness, max_tokens: int) -> Call:
    return harness.call({"model": MODEL, "messages": [], "max_tokens": max_tokens})


async def test_tokens_are_reserved_and_settled_with_what_was_reported() -> None:
    use = limits({"tokens_per_minute": 1000}, max_wait_s=0.0)
    async with Harness(TokenCounter, use, key("a")) as harness:
        harness.upstream.answer = harness.upstream.stream(b'data: {"choices": []}\n\n')
        run = harness.start(asking(harness, 600))
        await run.begun()
        refused(await harness.run(asking(harness, 600)))
        harness.upstream.source.feed(b"data: " + tokens(100, 50) + b"\n\n")
        harness.upstream.source.finish(b"data: [DONE]\n\n")
        await run.ended()
        harness.upstream.answer = harness.upstream.whole(tokens(5, 800))
        assert (await harness.run(asking(harness, 800))).client.status == 200
        error = refused(await harness.run(asking(harness, 100)))
        assert "1000 tokens a minute" in error.message
        assert limited(harness, "tokens_per_minute") == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"body": b"", "method": "GET", "path": "/fake/v1/files"},
        {"path": "/v1/messages/count_tokens"},
    ],
    ids=lambda asked: str(asked["path"]),
)
async def test_what_takes_no_tokens_is_not_counted(asked: dict[str, Any]) -> None:
    upstream = FakeUpstream(dialect=ANTHROPIC) if "count" in asked["path"] else None
    use = limits({"tokens_per_minute": 10}, max_wait_s=0.0)
    async with Harness(TokenCounter, use, key("a"), upstream=upstream) as harness:
        harness.upstream.answer = saying(
            {
                "x-ratelimit-limit-tokens": "10",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "30s",
            }
        )
        for _ in range(3):
            assert (await harness.run(harness.call(**asked))).client.status == 200


async def test_tokens_come_back_for_an_error_and_stay_for_an_answer_that_died() -> None:
    use = limits({"tokens_per_minute": 1000}, max_wait_s=0.0)
    async with Harness(TokenCounter, use, key("a")) as harness:
        harness.upstream.answer = harness.upstream.whole(b"{}", status=529)
        for _ in range(3):
            assert (await harness.run(asking(harness, 900))).client.status == 529
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n")
        run = harness.start(asking(harness, 900))
        await run.begun()
        harness.upstream.source.fail()
        await run.ended()
        refused(await harness.run(asking(harness, 900)))


async def test_an_attempt_larger_than_the_limit_takes_all_of_it() -> None:
    use = limits({"tokens_per_minute": 1000}, max_wait_s=0.0)
    async with Harness(TokenCounter, use, key("a")) as harness:
        harness.upstream.answer = harness.upstream.whole(tokens(5, 5))
        assert (await harness.run(asking(harness, 50_000))).client.status == 200


async def test_models_are_counted_apart_when_the_upstream_does() -> None:
    use = limits({"requests_per_minute": 1, "per": ["model"]}, max_wait_s=0.0)
    async with Harness(use, key("a")) as harness:
        for model, status in (("one", 200), ("two", 200), ("one", 429)):
            run = await harness.run(harness.call({"model": model}))
            assert run.client.status == status
        call = harness.call({"model": "alias"})  # the name at the upstream counts
        call.targets = (Target(harness.upstream, "two"),)
        assert (await harness.run(call)).client.status == 429


# Learned


async def test_nothing_goes_out_while_the_provider_says_that_nothing_remains() -> None:
    async with Harness(limits(), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED)
        assert await statuses(harness, 1) == [200]
        for _ in range(2):
            error = refused(await harness.run())
            assert error.message == "upstream fake has asked to wait"
            harness.clock.turn(14.9)
        assert error.retry_after_s == pytest.approx(15.1)
        assert len(harness.upstream.sent) == 1
        assert limited(harness, "learned-requests") == 2
        harness.clock.turn(0.3)
        harness.upstream.answer = saying({"x-ratelimit-remaining-requests": "9"})
        assert await statuses(harness, 2) == [200, 200]


async def test_a_short_reset_is_waited_for() -> None:
    async with Harness(limits(), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED | {"x-ratelimit-reset-requests": "500ms"})
        await harness.run()
        run = harness.start()
        await asleep(harness)
        harness.clock.turn(0.5)
        await run.ended()
        assert run.client.status == 200
        assert limited(harness, "learned-requests", "waited") == 1


@pytest.mark.parametrize("how", ["seconds", "milliseconds", "date"])
@pytest.mark.parametrize("keys", ["a", "ab"])
async def test_a_429_holds_a_key_back_for_as_long_as_it_says(how: str, keys: str) -> None:
    async with Harness(limits(), key(*keys)) as harness:
        now = harness.clock.wall()
        fields = {
            "seconds": {"retry-after": "7"},
            "milliseconds": {"retry-after-ms": "7000"},
            # Of a provider whose clock is ahead.
            "date": {"retry-after": formatdate(now + 107, usegmt=True)}
            | {"date": formatdate(now + 100, usegmt=True)},
        }[how]
        harness.upstream.answer = saying(fields, status=429)
        assert await statuses(harness, 3) == [429, 429, 429]
        assert len(harness.upstream.sent) == len(keys)
        harness.upstream.answer = saying({})
        harness.clock.turn(7.0)
        assert await statuses(harness, 1) == [200]


async def test_a_429_is_heeded_also_when_much_remained_a_moment_ago() -> None:
    async with Harness(limits(), key("a")) as harness:
        much = {"x-ratelimit-limit-requests": "9", "x-ratelimit-remaining-requests": "9"}
        harness.upstream.answer = saying(much)
        await harness.run()
        harness.upstream.answer = saying({"retry-after": "7"}, status=429)
        await harness.run()
        assert refused(await harness.run()).retry_after_s == pytest.approx(7.0)


async def test_answers_are_read_again_after_a_moment_in_which_much_remained() -> None:
    async with Harness(limits(), key("a")) as harness:
        much = {"x-ratelimit-limit-requests": "9", "x-ratelimit-remaining-requests": "9"}
        harness.upstream.answer = saying(much)
        await harness.run()
        harness.upstream.answer = saying(PAUSED)
        assert await statuses(harness, 2) == [200, 200]
        harness.clock.turn(FRESH_S)
        assert await statuses(harness, 2) == [200, 429]


async def test_a_429_without_a_time_is_left_to_retries() -> None:
    async with Harness(limits()) as harness:
        harness.upstream.answer = saying({}, status=429)
        assert await statuses(harness, 2) == [429, 429]
        assert len(harness.upstream.sent) == 2


async def test_attempts_in_flight_are_taken_off_what_remains() -> None:
    async with Harness(limits(max_wait_s=0.0), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED | {"x-ratelimit-remaining-requests": "2"})
        await harness.run()
        harness.upstream.answer = harness.upstream.silent()
        runs = []
        for _ in range(2):
            harness.upstream.asked.clear()
            runs.append(harness.start())
            await harness.upstream.asked.wait()
        refused(await harness.run())
        for run in runs:
            run.client_leaves()
            await run.ended()
        refused(await harness.run())  # the provider has counted both


async def test_a_failed_connection_takes_nothing_off_what_remains() -> None:
    async with Harness(limits(max_wait_s=0.0), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED | {"x-ratelimit-remaining-requests": "1"})
        await harness.run()
        harness.upstream.answer = harness.upstream.failing()
        assert await statuses(harness, 3) == [502] * 3
        harness.upstream.answer = saying({})
        assert await statuses(harness, 2) == [200, 429]


async def test_tokens_that_remain_hold_back_who_asks_for_more() -> None:
    fields = {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "300",
        "x-ratelimit-reset-tokens": "42s",
    }
    async with Harness(limits(), key("a")) as harness:
        harness.upstream.answer = saying(fields)
        await harness.run()
        assert (await harness.run(asking(harness, 100))).client.status == 200
        error = refused(await harness.run(asking(harness, 500)))
        assert error.retry_after_s == pytest.approx(42.0)
        assert limited(harness, "learned-tokens") == 1


async def test_without_learning_answers_are_not_heeded() -> None:
    async with Harness(limits({"learn": False}), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED)
        assert await statuses(harness, 3) == [200] * 3


async def test_what_is_learned_survives_a_reload_and_is_shared_by_teams() -> None:
    async with Harness(limits(), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED)
        await harness.run()
        made = [harness._make(limits()), harness._make(key("a"))]
        dispatch = Dispatch(models=Models({}), taps_events=False, now=harness.clock.monotonic)
        attempts = [each for each in made if isinstance(each, AttemptFilter)]
        dispatch.attempt_chain = link_attempt(attempts, dispatch.attempt_chain)
        harness.run_call = dispatch
        refused(await harness.run())


async def test_learning_works_without_sign_in_the_chain() -> None:
    async with Harness(limits()) as harness:
        harness.upstream.answer = saying({"x-ratelimit-remaining-requests": "9"})
        await harness.run()  # nobody has asked for a key
        harness.upstream.answer = saying(PAUSED)
        assert await statuses(harness, 3) == [200, 429, 429]


async def test_an_upstream_without_credentials_of_ours_is_counted_by_the_callers_key() -> None:
    upstream = FakeUpstream()
    upstream.passes_client_key = True
    async with Harness(limits(), Use(Sign, {}, {}), upstream=upstream) as harness:
        harness.upstream.answer = saying(PAUSED)
        for who, status in (("one", 200), ("two", 200), ("one", 429)):
            call = harness.call(headers=[("authorization", f"Bearer {who}")])
            assert (await harness.run(call)).client.status == status


# By key


async def test_keys_take_turns_until_none_has_room() -> None:
    use = limits({"requests_per_minute": 2, "per": ["key"]}, max_wait_s=0.0)
    async with Harness(use, key("a", "b")) as harness:
        assert await statuses(harness, 5) == [200, 200, 200, 200, 429]
        assert sorted(keys_used(harness)) == ["a", "a", "b", "b"]
        error = refused(await harness.run())
        assert error.retry_after_s == pytest.approx(61.0, abs=1.0)


async def test_a_key_without_room_is_skipped_and_the_others_go_on() -> None:
    async with Harness(limits(), key("a", "b")) as harness:
        harness.upstream.answer = saying(PAUSED)
        await harness.run()
        harness.upstream.answer = saying({})
        assert await statuses(harness, 3) == [200] * 3
        assert keys_used(harness) == ["a", "b", "b", "b"]
        harness.clock.turn(30.0)
        assert await statuses(harness, 2) == [200, 200]
        assert "a" in keys_used(harness)[-2:]


async def test_the_slots_of_a_key_are_given_back() -> None:
    use = limits({"concurrency": 1, "per": ["key"]})
    async with Harness(use, key("a", "b")) as harness:
        harness.upstream.answer = harness.upstream.stream(b"data: 1\n\n")
        runs = []
        for _ in range(2):
            runs.append(harness.start())
            await runs[-1].begun()
        refused(await harness.run())
        runs[1].client_leaves()
        await runs[1].ended()
        again = harness.start()
        await again.begun()
        assert keys_used(harness) == ["a", "b", "b"]
        for run in (runs[0], again):
            run.client_leaves()
            await run.ended()


async def test_keys_have_a_limit_of_their_own_also_when_there_is_one() -> None:
    use = limits({"requests_per_minute": 1, "per": ["key"], "learn": False}, max_wait_s=0.0)
    async with Harness(use, key("a")) as harness:
        assert await statuses(harness, 2) == [200, 429]


async def test_a_pool_waits_shortly_for_the_first_key_that_has_room() -> None:
    async with Harness(limits(), key("a", "b")) as harness:
        for reset in ("400ms", "30s"):
            harness.upstream.answer = saying(PAUSED | {"x-ratelimit-reset-requests": reset})
            await harness.run()
        run = harness.start()
        await asleep(harness)
        harness.clock.turn(0.4)
        await run.ended()
        assert run.client.status == 200
        assert keys_used(harness) == ["a", "b", "a"]


class FailsOnce(AttemptFilter):
    """Between the limits and `sign`: an attempt that fails before any key is asked for."""

    has_failed = False

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        if not self.has_failed:
            self.has_failed = True
            raise UpstreamError(Phase.ADMIT, Retry.ELSEWHERE, "circuit_open", "no", status=503)
        return await call_next(attempt)


async def test_a_refusal_of_another_filter_is_not_waited_out() -> None:
    async with Harness(limits({"requests_per_minute": 1}), FailsOnce, key("a")) as harness:
        assert await statuses(harness, 2) == [503, 200]  # and its charge came back
        families = {each["name"]: each["samples"] for each in harness.metrics.snapshot()}
        assert families["llm_sidecar_upstream_limited"] == []


class ChangesItsMind(AttemptFilter):
    """Asks for one key, cannot use it after all, and takes another."""

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        for name in ("first", "second"):
            assert attempt.key_gate is not None
            assert attempt.key_gate(name) == 0.0
        attempt.key_gate = None
        return await call_next(attempt)


async def test_tokens_in_flight_are_those_of_the_key_that_is_used() -> None:
    fields = {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "900"}
    async with Harness(limits(), ChangesItsMind) as harness:
        made = harness.filters[0]
        assert isinstance(made, UpstreamLimits)
        place = made._places["fake"]
        harness.upstream.answer = saying(fields)
        await harness.run(asking(harness, 100))
        first = place.allowance(MODEL, "first")
        first.begin(0, 0)
        first.end(0, 0, read([(b"x-ratelimit-remaining-tokens", b"900")]))
        del place.allowances[MODEL, "second"]  # nothing is known of it any more
        await harness.run(asking(harness, 100))
        for name in ("first", "second"):
            each = place.allowance(MODEL, name)
            assert (each.in_flight, each.input, each.output) == (0, 0, 0)


async def test_a_key_that_is_not_used_after_all_gets_everything_back() -> None:
    settings = {"requests_per_minute": 1, "tokens_per_minute": 2000, "concurrency": 1}
    use = limits(settings | {"per": ["key"]})
    async with Harness(use, ChangesItsMind) as harness:
        harness.upstream.answer = saying(PAUSED | {"x-ratelimit-remaining-requests": "5"})
        assert await statuses(harness, 1) == [200]
        made = harness.filters[0]
        assert isinstance(made, UpstreamLimits)
        place = made._places["fake"]
        assert place.allowance(MODEL, "first").in_flight == 0
        assert place.allowance(MODEL, "first").quotas == {}
        assert place.allowance(MODEL, "second").quotas[0].remaining == 5
        amounts = (1, 2000)
        assert isinstance(await place.meter_of(MODEL, "first").take(amounts), Grant)
        refused = await place.meter_of(MODEL, "second").take(amounts)
        assert isinstance(refused, Refusal)


async def test_what_is_not_by_key_is_taken_once_however_often_the_attempt_waits() -> None:
    async with Harness(limits({"requests_per_minute": 2, "concurrency": 1}), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED | {"x-ratelimit-reset-requests": "400ms"})
        await harness.run()
        run = harness.start()
        await asleep(harness)
        harness.clock.turn(0.4)
        await run.ended()
        assert run.client.status == 200
        assert (await harness.run()).client.status == 429
        assert limited(harness, "requests_per_minute") == 1


async def test_calls_that_come_at_once_do_not_overrun_what_is_by_key_without_any_sign() -> None:
    async with Harness(limits({"requests_per_minute": 2, "per": ["key"]})) as harness:
        runs = [harness.start() for _ in range(50)]
        ends = [(await run.ended()).status for run in runs]
        assert (ends.count(200), ends.count(429), len(harness.upstream.sent)) == (2, 48, 2)


async def test_callers_keys_that_the_upstream_never_sees_count_together() -> None:
    use = limits({"requests_per_minute": 2, "per": ["key"]})
    async with Harness(use, Use(Sign, {}, {})) as harness:
        calls = [harness.call(headers=[("x-api-key", f"sk-{number}")]) for number in range(3)]
        assert [(await harness.run(call)).client.status for call in calls] == [200, 200, 429]


async def test_allowances_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.upstream_limits.MAX_ALLOWANCES", 3)
    use = limits({"requests_per_minute": 9, "per": ["model", "key"]})
    async with Harness(use, Use(Sign, {}, {})) as harness:
        harness.upstream.passes_client_key = True
        for number in range(10):
            call = harness.call(headers=[("x-api-key", f"sk-{number}")])
            assert (await harness.run(call)).client.status == 200
        made = harness.filters[0]
        assert isinstance(made, UpstreamLimits)
        place = made._places["fake"]
        assert max(len(place._meters), len(place.allowances)) <= 3


async def test_a_panel_shows_what_was_learned() -> None:
    async with Harness(limits(), key("a")) as harness:
        harness.upstream.answer = saying(PAUSED)
        await harness.run()
        (panel,) = harness.resources.of_kind("panel").values()
        (shown,) = (await panel.show())["fake"]
        assert (shown["model"], shown["remaining"]) == (MODEL, {"requests": 0})
        assert len(shown["key"]) == 8
