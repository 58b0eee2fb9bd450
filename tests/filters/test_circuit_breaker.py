"""What ends of attempts count, what a refused attempt gets, and what operators see and do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from filters.circuit_breaker import CALLER_CODES, RATE_CODES, CircuitBreaker
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    Panel,
    Phase,
    Rejected,
    Reply,
    Retry,
    Target,
    UpstreamError,
)
from sidecar.call import completed
from tests.contract.scenarios import FIRST
from tests.support.harness import MODEL, Answer, FakeUpstream, Harness, Run, Use, broken

CIRCUIT = {"upstream": "fake", "model": MODEL}


def breaker(upstream: Mapping[str, Any] | None = None, /, **settings: Any) -> Use:
    """The filter without chance, and the upstream's own section."""
    section = CircuitBreaker.UpstreamConfig.model_validate(dict(upstream or {}))
    return Use(CircuitBreaker, {"recovery_jitter": 0.0, **settings}, {"fake": section})


def panel(harness: Harness) -> Panel:
    found: Panel = harness.resources.of_kind("panel")["circuits"]
    return found


async def shown(harness: Harness, model: str = MODEL) -> dict[str, Any]:
    (found,) = [each for each in await panel(harness).show() if each["model"] == model]
    return dict(found)


async def state(harness: Harness, model: str = MODEL) -> str:
    return str((await shown(harness, model))["state"])


def refusal(run: Run) -> UpstreamError:
    error = run.client.error
    assert isinstance(error, UpstreamError), error
    assert error.code == "circuit_open"
    return error


def bad(harness: Harness, status: int = 500) -> Answer:
    return harness.upstream.whole(b'{"error": {}}', status=status)


def good(harness: Harness) -> Answer:
    return harness.upstream.whole(b"{}")


async def runs(harness: Harness, count: int) -> list[Run]:
    return [await harness.run() for _ in range(count)]


async def opened(harness: Harness) -> None:
    harness.upstream.answer = bad(harness)
    await runs(harness, 5)
    assert await state(harness) == "open"


async def half_open(harness: Harness) -> None:
    """Open, and a probe may go; answers are well again."""
    await opened(harness)
    harness.clock.turn(60.0)
    harness.upstream.answer = good(harness)


async def streaming(harness: Harness) -> Run:
    harness.upstream.answer = harness.upstream.stream(FIRST)
    run = harness.start()
    await run.begun()
    return run


# What opens it


async def test_open_circuit_refuses_and_the_upstream_is_not_asked() -> None:
    async with Harness(breaker()) as harness:
        await opened(harness)
        harness.clock.turn(48.0)
        error = refusal(await harness.run())
        assert (error.phase, error.retry, error.status) == (Phase.ADMIT, Retry.ELSEWHERE, 503)
        assert error.retry_after_s == 12.0
        assert len(harness.upstream.sent) == 5


async def test_refused_attempts_do_not_count_as_failures() -> None:
    async with Harness(breaker()) as harness:
        await opened(harness)
        await runs(harness, 50)
        assert await shown(harness) == {
            **CIRCUIT,
            "state": "open",
            "failures": 5,
            "retry_in_s": 60.0,
            "forced": None,
        }
        harness.clock.turn(60.0)
        harness.upstream.answer = good(harness)
        assert (await harness.run()).client.status == 200


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
async def test_answers_from_500_up_open_it(status: int) -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = bad(harness, status)
        await runs(harness, 5)
        assert await state(harness) == "open"


@pytest.mark.parametrize(
    "phase",
    [Phase.RESOLVE, Phase.CONNECT, Phase.TLS, Phase.SEND, Phase.HEAD, Phase.FIRST_EVENT],
)
async def test_attempts_without_an_answer_open_it(phase: Phase) -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = harness.upstream.failing(broken(phase))
        await runs(harness, 5)
        assert await state(harness) == "open"


async def test_timeouts_open_it() -> None:
    async with Harness(breaker()) as harness:
        error = UpstreamError(Phase.SEND, Retry.SAME, "upstream_timeout", "no answer", status=504)
        harness.upstream.answer = harness.upstream.failing(error)
        await runs(harness, 5)
        assert await state(harness) == "open"


async def test_streams_that_die_midway_open_it() -> None:
    async with Harness(breaker()) as harness:
        for _ in range(5):
            run = await streaming(harness)
            assert await state(harness) == "closed"  # a 200 so far
            harness.upstream.source.fail()
            await run.ended()
        assert await state(harness) == "open"


class GivesUpAnswers(CallFilter):
    """What a retry does with an answer that it does not want."""

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        (await call_next(call)).discard()
        return Reply.of(200, b"{}")


async def test_5xx_that_a_retry_gives_up_opens_it() -> None:
    async with Harness(GivesUpAnswers, breaker()) as harness:
        harness.upstream.answer = bad(harness, 503)
        await runs(harness, 5)
        assert await state(harness) == "open"


async def test_429_that_a_retry_gives_up_opens_it_if_told_to() -> None:
    for count_429, expected in ((False, "closed"), (True, "open")):
        async with Harness(GivesUpAnswers, breaker(count_429=count_429)) as harness:
            harness.upstream.answer = bad(harness, 429)
            await runs(harness, 5)
            assert await state(harness) == expected


async def test_rate_opens_it_when_it_is_set() -> None:
    async with Harness(breaker(failure_rate=0.5, min_calls=4, window_s=10)) as harness:
        for answer in (bad(harness), good(harness)) * 2:
            harness.upstream.answer = answer
            await harness.run()
        assert await state(harness) == "closed"
        harness.upstream.answer = bad(harness)
        await harness.run()
        assert await state(harness) == "open"


# What does not


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 422, 429])
async def test_callers_own_mistakes_prove_the_upstream_alive(status: int) -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 4)
        harness.upstream.answer = bad(harness, status)
        await runs(harness, 10)
        assert await shown(harness) == {
            **CIRCUIT,
            "state": "closed",
            "failures": 0,
            "retry_in_s": 0.0,
            "forced": None,
        }


async def test_429_counts_if_told_to() -> None:
    async with Harness(breaker(count_429=True)) as harness:
        harness.upstream.answer = bad(harness, 429)
        await runs(harness, 5)
        assert await state(harness) == "open"


@pytest.mark.parametrize("code", sorted(CALLER_CODES | RATE_CODES))
async def test_callers_mistake_as_first_event_of_a_200_is_no_failure(code: str) -> None:
    async with Harness(breaker()) as harness:
        error = UpstreamError(
            Phase.FIRST_EVENT, Retry.SAME, "upstream_error_event", "no", provider_code=code
        )
        harness.upstream.answer = harness.upstream.failing(error)
        await runs(harness, 10)
        assert await state(harness) == "closed"


async def test_overload_as_first_event_of_a_200_is_a_failure() -> None:
    async with Harness(breaker()) as harness:
        error = UpstreamError(
            *(Phase.FIRST_EVENT, Retry.SAME, "upstream_error_event", "busy"),
            provider_code="overloaded_error",
        )
        harness.upstream.answer = harness.upstream.failing(error)
        await runs(harness, 5)
        assert await state(harness) == "open"


async def test_rate_limit_as_first_event_of_a_200_counts_if_told_to() -> None:
    async with Harness(breaker(count_429=True)) as harness:
        error = UpstreamError(
            *(Phase.FIRST_EVENT, Retry.SAME, "upstream_error_event", "slow down"),
            provider_code="rate_limit_error",
        )
        harness.upstream.answer = harness.upstream.failing(error)
        await runs(harness, 5)
        assert await state(harness) == "open"


@pytest.mark.parametrize("phase", [Phase.ADMIT, Phase.SIGN, Phase.POOL])
async def test_what_was_never_sent_says_nothing(phase: Phase) -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 4)
        error = UpstreamError(phase, Retry.ELSEWHERE, "held_back", "not now", status=429)
        harness.upstream.answer = harness.upstream.failing(error)
        await runs(harness, 10)
        assert (await shown(harness))["failures"] == 4


async def test_client_that_leaves_is_no_failure_before_the_answer_nor_within_it() -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 4)
        for _ in range(5):
            harness.upstream.answer = harness.upstream.silent()
            harness.upstream.asked.clear()
            run = harness.start()
            await harness.upstream.asked.wait()
            run.client_leaves()
            await run.ended()
            run = await streaming(harness)
            run.client_leaves()
            await run.ended()
        assert (await shown(harness))["failures"] == 4


async def test_attempts_that_we_stop_say_nothing() -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 4)
        for _ in range(5):
            run = await streaming(harness)
            run.abort()
            await run.ended()
        assert (await shown(harness))["failures"] == 4


async def test_good_answer_that_was_given_up_says_nothing() -> None:
    async with Harness(GivesUpAnswers, breaker()) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 4)
        harness.upstream.answer = harness.upstream.stream(FIRST)
        await runs(harness, 5)
        assert (await shown(harness))["failures"] == 4


class RefusesAttempt(AttemptFilter):
    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        raise Rejected(400, "no", "no")


async def test_attempt_that_a_later_filter_rejects_says_nothing() -> None:
    async with Harness(breaker(), RefusesAttempt) as harness:
        await runs(harness, 10)
        assert (await shown(harness))["failures"] == 0


# Probes


async def test_no_more_probes_at_a_time_than_allowed_though_they_stream() -> None:
    async with Harness(breaker()) as harness:
        await half_open(harness)
        probes = [await streaming(harness) for _ in range(3)]
        assert refusal(await harness.run()).retry_after_s == 1.0
        harness.clock.turn(3600.0)
        assert refusal(await harness.run()).retry_after_s == 1.0
        assert await state(harness) == "half_open"
        assert len(harness.upstream.sent) == 8
        for run in probes:
            run.client_leaves()
            await run.ended()


async def test_probe_whose_client_leaves_gives_its_place_to_the_next() -> None:
    async with Harness(breaker(half_open_max=1, success_threshold=1)) as harness:
        await half_open(harness)
        for _ in range(3):
            run = await streaming(harness)
            refusal(await harness.run())
            run.client_leaves()
            await run.ended()
            assert await state(harness) == "half_open"
        harness.upstream.answer = good(harness)
        await harness.run()
        assert await state(harness) == "closed"


async def test_probe_that_dies_midway_opens_it_again_for_longer() -> None:
    async with Harness(breaker()) as harness:
        await half_open(harness)
        await runs(harness, 2)
        run = await streaming(harness)
        harness.upstream.source.fail()
        await run.ended()
        assert (await shown(harness))["retry_in_s"] == 120.0


async def test_probes_that_succeed_close_it() -> None:
    async with Harness(breaker()) as harness:
        await half_open(harness)
        assert {run.client.status for run in await runs(harness, 3)} == {200}
        assert await state(harness) == "closed"


async def test_stream_from_before_it_opened_changes_nothing_when_it_ends() -> None:
    async with Harness(breaker(half_open_max=1)) as harness:
        late = await streaming(harness)
        source = harness.upstream.source
        await half_open(harness)
        probe = await streaming(harness)
        source.fail()
        await late.ended()
        assert await state(harness) == "half_open"
        refusal(await harness.run())
        probe.client_leaves()
        await probe.ended()


# Which circuit, with which settings


async def test_each_model_has_its_circuit() -> None:
    async with Harness(breaker()) as harness:
        await opened(harness)
        other = harness.call({"model": "gpt-4o"})
        await harness.run(other)
        assert await state(harness, "gpt-4o") == "closed"
        assert len(harness.upstream.sent) == 6


async def test_each_upstream_has_its_circuit() -> None:
    other = FakeUpstream("other")
    async with Harness(breaker()) as harness:
        await opened(harness)
        harness.upstream = other
        await harness.run()
        assert len(other.sent) == 1


async def test_calls_that_pass_through_share_one_of_their_own() -> None:
    async with Harness(breaker()) as harness:
        harness.upstream.answer = bad(harness)
        for number in range(5):
            await harness.run(harness.call(path=f"/fake/v1/other/{number}"))
        assert await state(harness, "") == "open"
        assert harness.value("llm_sidecar_circuits", upstream="fake", model="-", state="open") == 1


async def test_upstream_says_what_is_different_there_and_no_more() -> None:
    async with Harness(breaker({"failure_threshold": 2}, recovery_timeout_s=7.0)) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 2)
        assert (await shown(harness))["retry_in_s"] == 7.0


async def test_upstream_may_put_a_rate_aside() -> None:
    use = breaker({"failure_rate": None}, failure_rate=0.9, failure_threshold=2)
    async with Harness(use) as harness:
        harness.upstream.answer = bad(harness)
        await runs(harness, 2)
        assert await state(harness) == "open"


async def test_circuit_is_shared_by_teams_and_outlives_a_reload() -> None:
    async with Harness(breaker(), breaker(failure_threshold=50)) as harness:
        await opened(harness)
        first, second = harness.filters
        assert first._circuits is second._circuits  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_threshold": 0},
        {"failure_rate": 0.0},
        {"failure_rate": 1.1},
        {"window_s": 0},
        {"window_s": 601},
        {"recovery_timeout_s": 0.0},
        {"recovery_jitter": 0.6},
        {"half_open_max": 0},
        {"success_threshold": 0},
        {"when_store_is_down": "shut"},
        {"threshold": 5},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CircuitBreaker.Config.model_validate(wrong)


# What operators see


async def test_changes_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def value(state: str) -> Any:
        return harness.value("llm_sidecar_circuits", **CIRCUIT, state=state)

    def changes(to: str) -> Any:
        return harness.value("llm_sidecar_circuit_transitions", **CIRCUIT, to=to)

    async with Harness(breaker()) as harness:
        await harness.run()
        assert [value(each) for each in ("closed", "open", "half_open")] == [1, 0, 0]
        await opened(harness)
        assert [value(each) for each in ("closed", "open", "half_open")] == [0, 1, 0]
        await harness.run()
        assert harness.value("llm_sidecar_circuit_refused", **CIRCUIT) == 1
        harness.clock.turn(60.0)
        harness.upstream.answer = good(harness)
        await harness.run()
        assert [value(each) for each in ("closed", "open", "half_open")] == [0, 0, 1]
        await runs(harness, 2)
        assert [value(each) for each in ("closed", "open", "half_open")] == [1, 0, 0]
        assert [changes(each) for each in ("closed", "open", "half_open")] == [1, 1, 1]
    lines = [each for each in caplog.records if each.name == "filters.circuit_breaker"]
    assert [each.getMessage() for each in lines] == [
        "circuit_opened",
        "circuit_half_open",
        "circuit_closed",
    ]
    assert {(each.upstream, each.model) for each in lines} == {("fake", MODEL)}  # type: ignore[attr-defined]


async def test_operator_forces_a_circuit_open_and_lets_go_again() -> None:
    async with Harness(breaker()) as harness:
        await harness.run()
        (answer,) = await panel(harness).act({**CIRCUIT, "force": "open"})
        assert answer == await shown(harness)
        assert (answer["state"], answer["forced"], answer["retry_in_s"]) == ("open", "open", None)
        assert refusal(await harness.run()).retry_after_s is None
        await panel(harness).act({**CIRCUIT, "force": None})
        assert (await harness.run()).client.status == 200
        assert (await shown(harness))["forced"] is None


async def test_operator_forces_a_circuit_closed_whatever_the_upstream_does() -> None:
    async with Harness(breaker()) as harness:
        await opened(harness)
        await panel(harness).act({**CIRCUIT, "force": "closed"})
        assert {run.client.status for run in await runs(harness, 20)} == {500}


async def test_operator_forces_all_models_of_an_upstream_also_those_to_come() -> None:
    async with Harness(breaker()) as harness:
        await harness.run()
        await panel(harness).act({"upstream": "fake", "force": "open"})
        refusal(await harness.run())
        refusal(await harness.run(harness.call({"model": "never-called"})))
        await panel(harness).act({"upstream": "fake", "model": "*", "force": None})
        for model in (MODEL, "never-called", "nor-this"):
            assert (await harness.run(harness.call({"model": model}))).client.status == 200


async def test_circuit_that_is_let_go_leaves_the_others_of_its_upstream_forced() -> None:
    async with Harness(breaker()) as harness:
        await harness.run()  # the circuit is there
        await panel(harness).act({"upstream": "fake", "force": "open"})
        await panel(harness).act({**CIRCUIT, "force": None})
        assert (await harness.run()).client.status == 200
        refusal(await harness.run(harness.call({"model": "gpt-4o"})))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"upstream": "nobody", "force": "open"}, "one of: fake"),
        ({"force": "open"}, "one of: fake"),
        ({"upstream": ["fake"], "force": "open"}, "one of: fake"),
        ({"upstream": "fake"}, '"open", "closed" or null'),
        ({"upstream": "fake", "force": "half_open"}, '"open", "closed" or null'),
        ({"upstream": "fake", "force": 1}, '"open", "closed" or null'),
        ({"upstream": "fake", "force": ["open"]}, '"open", "closed" or null'),
        ({"upstream": "fake", "model": 1, "force": "open"}, "model must be"),
        ({"upstream": "fake", "force": "open", "modle": MODEL}, "unknown: modle"),
        ({"upstream": "fake", "model": "nobody-asked", "force": "open"}, "none yet"),
    ],
    ids=str,
)
async def test_command_that_is_wrong_says_what_is(wrong: dict[str, Any], hint: str) -> None:
    async with Harness(breaker()) as harness:
        with pytest.raises(ValueError, match=hint):
            await panel(harness).act(wrong)


async def test_closed_circuit_asks_no_clock_and_holds_no_attempt() -> None:
    """Nearly every attempt: what it costs is two objects and a comparison."""

    class Stopped:
        def monotonic(self) -> float:
            raise AssertionError

    async with Harness(breaker()) as harness:
        await harness.run()
        (each,) = harness.filters
        circuit = each._circuits.circuit("fake", MODEL)  # type: ignore[attr-defined]
        circuit._clock = Stopped()
        run = await harness.run()
        assert run.call.end is completed(200)
        assert repr(circuit) == f"<Circuit fake {MODEL} CLOSED failures=0>"


async def test_targets_of_one_model_at_one_upstream_have_circuits_of_their_own() -> None:
    async with Harness(breaker()) as harness:

        async def answer(attempt: Attempt) -> Reply:
            return Reply.of(500 if attempt.target.model == "large" else 200, b"{}")

        harness.upstream.answer = answer

        async def status(model: str) -> int:
            call = harness.call()
            call.target = Target(harness.upstream, model)
            return (await harness.run(call)).client.status

        assert [await status("large") for _ in range(6)] == [500] * 5 + [503]
        assert await status("small") == 200
        assert await state(harness, "large") == "open"
        assert await state(harness, "small") == "closed"
