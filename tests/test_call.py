"""Scopes and their debts, ends and whose fault they are, and the request's JSON."""

from __future__ import annotations

import asyncio
import contextlib
from hashlib import sha256
from math import inf
from typing import Any

import orjson
import pytest

from sidecar import call as call_module
from sidecar.call import (
    USAGE,
    Call,
    End,
    Key,
    Outcome,
    Scope,
    Usage,
    completed,
    end_of,
    key_of,
)
from sidecar.errors import CallError, Phase, Rejected, Retry, UpstreamError
from sidecar.tasks import Tasks
from tests.support.harness import Harness

COUNT: Key[int] = Key("count")
OTHER_COUNT: Key[int] = Key("count")


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


@pytest.fixture
def scope(tasks: Tasks) -> Scope:
    return Scope(tasks)


async def all_done(tasks: Tasks) -> None:
    await tasks.stop(timeout_s=5.0)


# Debts


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_debts_are_paid_once_newest_first_on_every_outcome(
    outcome: Outcome, scope: Scope, tasks: Tasks
) -> None:
    paid: list[str] = []

    async def settle(end: End) -> None:
        paid.append(f"settled {end.outcome}")

    scope.on_end(lambda end: paid.append(f"first {end.outcome}"))
    scope.on_settle(settle)
    scope.on_end(lambda end: paid.append(f"second {end.outcome}"))
    scope.finish(End(outcome, 200))
    scope.finish(End(Outcome.ABORTED))
    assert paid == [f"second {outcome}", f"first {outcome}"]
    await all_done(tasks)
    assert paid[2:] == [f"settled {outcome}"]
    assert scope.end is not None
    assert scope.end.outcome is outcome


def test_debt_owed_after_the_end_is_paid_at_once(scope: Scope) -> None:
    paid: list[End] = []
    scope.finish(completed(200))
    scope.on_end(paid.append)
    assert paid == [scope.end]


def test_debt_owed_while_debts_are_paid_is_paid_at_once(scope: Scope) -> None:
    paid: list[str] = []

    def owe_more(end: End) -> None:
        scope.on_end(lambda end: paid.append("late"))
        paid.append("first")

    scope.on_end(lambda end: paid.append("oldest"))
    scope.on_end(owe_more)
    scope.finish(completed(200))
    assert paid == ["late", "first", "oldest"]


def test_debt_that_ends_the_scope_again_changes_nothing(scope: Scope) -> None:
    paid: list[str] = []
    scope.on_end(lambda end: paid.append("paid"))
    scope.on_end(lambda end: scope.finish(End(Outcome.ABORTED)))
    scope.finish(completed(200))
    assert paid == ["paid"]
    assert scope.end is completed(200)


def test_debt_that_raises_does_not_stop_the_others(
    scope: Scope, caplog: pytest.LogCaptureFixture
) -> None:
    paid: list[str] = []

    def fail(end: End) -> None:
        raise LookupError("a mistake of a filter")

    scope.on_end(lambda end: paid.append("first"))
    scope.on_end(fail)
    scope.on_end(lambda end: paid.append("third"))
    scope.finish(completed(200))
    assert paid == ["third", "first"]
    assert [record.message for record in caplog.records] == ["debt_failed"]


async def test_settling_goes_on_after_a_debt_that_raises(
    scope: Scope, tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    paid: list[str] = []

    async def pay(end: End) -> None:
        paid.append("paid")

    async def fail(end: End) -> None:
        raise LookupError("a mistake of a filter")

    scope.on_settle(pay)
    scope.on_settle(fail)
    scope.finish(completed(200))
    await all_done(tasks)
    assert paid == ["paid"]
    assert [record.message for record in caplog.records] == ["settle_failed"]


async def test_settling_is_a_named_task_that_the_end_does_not_wait_for(
    scope: Scope, tasks: Tasks
) -> None:
    released = asyncio.Event()
    paid: list[str] = []

    async def pay(end: End) -> None:
        await released.wait()
        paid.append("paid")

    scope.on_settle(pay)
    scope.finish(completed(200))
    assert len(tasks) == 1
    assert "settle" in {task.get_name() for task in asyncio.all_tasks()}
    assert paid == []
    released.set()
    await all_done(tasks)
    assert paid == ["paid"]


async def test_settling_has_a_time_limit_for_each_debt(
    scope: Scope,
    tasks: Tasks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(call_module, "SETTLE_TIMEOUT_S", 0.01)
    paid: list[str] = []

    async def pay(end: End) -> None:
        paid.append("paid")

    async def hang(end: End) -> None:
        await asyncio.get_running_loop().create_future()

    scope.on_settle(pay)
    scope.on_settle(hang)
    scope.finish(completed(200))
    await all_done(tasks)
    assert paid == ["paid"]
    assert [record.message for record in caplog.records] == ["settle_failed"]


def test_settling_cannot_be_owed_after_the_end(scope: Scope) -> None:
    async def pay(end: End) -> None:
        raise AssertionError("nobody runs this")

    scope.finish(completed(200))
    with pytest.raises(RuntimeError, match="before call_next"):
        scope.on_settle(pay)


def test_scope_without_debts_starts_no_task(scope: Scope, tasks: Tasks) -> None:
    scope.finish(completed(200))
    assert len(tasks) == 0


# Facts


def test_facts_are_found_under_their_key_and_no_other_of_its_name(scope: Scope) -> None:
    assert COUNT not in scope
    assert scope.get(COUNT) is None
    assert scope.get(COUNT, 5) == 5
    with pytest.raises(KeyError):
        scope[COUNT]
    scope[COUNT] = 1
    scope[COUNT] = 2
    assert scope[COUNT] == scope.get(COUNT) == 2
    assert COUNT in scope
    assert OTHER_COUNT not in scope
    with pytest.raises(KeyError):
        scope[OTHER_COUNT]
    assert repr(COUNT) == "<Key count>"


def test_facts_of_two_scopes_are_apart(tasks: Tasks) -> None:
    one, two = Scope(tasks), Scope(tasks)
    one[USAGE] = Usage(input=1)
    assert USAGE not in two


# Ends

FAULTS = {
    (Outcome.COMPLETED, 0): False,
    (Outcome.COMPLETED, 200): False,
    (Outcome.COMPLETED, 404): False,
    (Outcome.COMPLETED, 429): False,
    (Outcome.COMPLETED, 499): False,
    (Outcome.COMPLETED, 500): True,
    (Outcome.COMPLETED, 503): True,
    (Outcome.COMPLETED, 529): True,
    **{(Outcome.UPSTREAM_FAILED, status): True for status in (0, 200, 502, 504)},
    **{
        (outcome, status): False
        for outcome in (
            *(Outcome.CLIENT_GONE, Outcome.REJECTED, Outcome.DISCARDED, Outcome.ABORTED),
        )
        for status in (0, 200, 429, 500, 503)
    },
}


@pytest.mark.parametrize(("outcome", "status"), list(FAULTS))
def test_upstream_is_to_blame_for_these_ends_alone(outcome: Outcome, status: int) -> None:
    assert End(outcome, status).upstream_fault is FAULTS[outcome, status]


OURS = {Phase.ADMIT, Phase.SIGN, Phase.POOL}


@pytest.mark.parametrize("phase", list(Phase))
def test_upstream_is_not_to_blame_for_an_attempt_that_we_held_back(phase: Phase) -> None:
    for status in (502, 503, 504):
        error = UpstreamError(phase, Retry.ELSEWHERE, "any", "any", status=status)
        end = End(Outcome.UPSTREAM_FAILED, status, error)
        assert end.upstream_fault is (phase not in OURS)


def test_upstream_that_asks_us_to_wait_before_it_fails_is_not_to_blame() -> None:
    error = UpstreamError(Phase.FIRST_EVENT, Retry.SAME, "any", "any", status=429)
    assert not End(Outcome.UPSTREAM_FAILED, 429, error).upstream_fault


def test_completed_ends_are_made_once() -> None:
    assert completed(200) is completed(200)
    assert completed(503).upstream_fault
    assert (completed(999).outcome, completed(999).status) == (Outcome.COMPLETED, 999)
    assert (completed(101).outcome, completed(101).status) == (Outcome.COMPLETED, 101)


UPSTREAM = UpstreamError(Phase.CONNECT, Retry.SAME, "no_route", "no", status=504)
REJECTED = Rejected(429, "rate_limited", "slow down")
OWN = CallError(500, "internal_error", "a mistake")


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [
        (UPSTREAM, Outcome.UPSTREAM_FAILED, 504),
        (REJECTED, Outcome.REJECTED, 429),
        (OWN, Outcome.ABORTED, 500),
        (LookupError("x"), Outcome.ABORTED, 500),
    ],
)
def test_error_means_this_end(error: BaseException, outcome: Outcome, status: int) -> None:
    end = end_of(error, Harness().call())
    assert (end.outcome, end.status, end.error) == (outcome, status, error)


@pytest.mark.parametrize(
    ("why", "outcome"),
    [
        (None, Outcome.DISCARDED),  # a filter gave the attempt up: hedging, a time limit
        (Outcome.CLIENT_GONE, Outcome.CLIENT_GONE),
        (Outcome.ABORTED, Outcome.ABORTED),
    ],
)
def test_cancellation_means_what_the_call_was_cancelled_as(
    why: Outcome | None, outcome: Outcome
) -> None:
    call = Harness().call()
    call.cancelled_as = why
    end = end_of(asyncio.CancelledError(), call)
    assert (end.outcome, end.status, end.error) == (outcome, 0, None)


def test_end_shows_what_happened() -> None:
    assert repr(completed(200)) == "<End COMPLETED 200>"
    shown = repr(End(Outcome.REJECTED, 429, REJECTED))
    assert shown == "<End REJECTED 429 <Rejected 429 rate_limited: slow down>>"


def test_call_that_ends_with_an_error_lets_go_of_the_errors_frames() -> None:
    call = Harness().call()
    error = None
    with contextlib.suppress(UpstreamError):
        try:
            raise OSError("refused")
        except OSError as cause:
            raise UPSTREAM from cause
    error = UPSTREAM
    assert error.__traceback__ is not None
    call.finish(End(Outcome.UPSTREAM_FAILED, 502, error))
    assert error.__traceback__ is None
    assert error.__cause__ is not None
    assert error.__cause__.__traceback__ is None


# The request


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every body that is parsed."""
    seen: list[bytes] = []
    original = call_module.parse_object

    def counted(body: bytes) -> dict[str, Any]:
        seen.append(body)
        return original(body)

    monkeypatch.setattr(call_module, "parse_object", counted)
    return seen


def call_of(body: dict[str, Any] | bytes, path: str = "/fake/x") -> Call:
    return Harness().call(body, path=path)


def test_body_is_parsed_once_and_only_when_it_is_asked_for(parses: list[bytes]) -> None:
    call = call_of({"model": "m", "stream": True})
    assert not parses
    assert call.json == {"model": "m", "stream": True}
    assert call.is_stream
    assert len(parses) == 1


def test_replaced_json_is_what_goes_upstream(parses: list[bytes]) -> None:
    call = call_of({"model": "m"})
    call.replace_json({"model": "m", "n": 1})
    assert call.body is not None
    assert orjson.loads(call.body) == {"model": "m", "n": 1}
    assert call.json == {"model": "m", "n": 1}
    assert not parses


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"a":1}x'])
def test_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Rejected) as raised:
        _ = call_of(body).json
    assert (raised.value.status, raised.value.code) == (400, "invalid_json")


def test_body_that_streams_through_has_no_json() -> None:
    call = call_of(b"")
    call.body = None
    with pytest.raises(Rejected) as raised:
        _ = call.json
    assert (raised.value.status, raised.value.code) == (400, "body_not_json")
    assert not call.is_stream


@pytest.mark.parametrize(
    ("body", "is_stream"),
    [
        (b'{"stream": true}', True),
        (b'{"stream": false}', False),
        (b'{"stream": 1}', False),
        (b'{"messages": [{"content": "\\"stream\\": true"}]}', False),
        (b'{"options": {"stream": true}}', False),
        (b"{}", False),
        (b"", False),
    ],
)
def test_stream_is_asked_for_in_so_many_words(body: bytes, is_stream: bool) -> None:
    assert call_of(body).is_stream is is_stream


@pytest.mark.parametrize("body", [b'[{"stream": true}]', b'{"stream": true}\n{"stream": true}'])
def test_body_that_is_no_json_object_is_no_stream(body: bytes) -> None:
    assert not call_of(body).is_stream


# How long the caller waits


def told(*headers: tuple[str, str]) -> Call:
    return Harness().call(headers=headers)


def left_s(call: Call) -> float:
    """What is left when the call comes in."""
    return call.time_left(call.received_at)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("2.5", 2.5),
        ("0.001", 0.001),
        ("7.", 7.0),
        (" 5 ", 5.0),
        ("999999999", 3600.0),  # nobody holds a place for longer
    ],
)
def test_deadline_is_the_callers_own_from_the_moment_it_called(text: str, seconds: float) -> None:
    call = told(("X-Request-Timeout", text))
    assert left_s(call) == pytest.approx(seconds)
    assert call.deadline_at == pytest.approx(call.received_at + seconds)
    assert call.time_left(call.received_at + seconds + 1.0) == pytest.approx(-1.0)


def test_caller_that_says_nothing_waits_for_ever() -> None:
    call = told(("x-a", "1"))
    assert call.deadline_at is None
    assert left_s(call) == inf


@pytest.mark.parametrize("name", ["x-stainless-read-timeout", "X-Stainless-Timeout"])
def test_deadline_is_else_what_the_sdk_says_of_itself(name: str) -> None:
    assert left_s(told((name, "600"))) == 600.0
    assert left_s(told((name, "59.5"))) == 59.5


def test_callers_own_word_goes_before_its_sdks_and_the_read_timeout_before_the_other() -> None:
    sdk = (("x-stainless-timeout", "10"), ("x-stainless-read-timeout", "20"))
    assert left_s(told(*sdk)) == 20.0
    assert left_s(told(*sdk, ("x-request-timeout", "30"))) == 30.0


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.0", "00", "-1", "1s", "1e3", "inf", "nan", "1,5", ".5", "0x10", "١٢", "9" * 10],
)
def test_timeout_that_is_no_number_of_seconds_is_refused(text: str) -> None:
    call = told(("x-request-timeout", text), ("x-stainless-timeout", "10"))
    for _ in range(2):  # whoever asks, and again
        with pytest.raises(Rejected) as raised:
            left_s(call)
        assert (raised.value.status, raised.value.code) == (400, "invalid_timeout")
    assert "30 or 2.5" in raised.value.message


@pytest.mark.parametrize("text", ["NOT_GIVEN", "None", "", "-1", "1e3", "inf", "0", "0.0"])
def test_what_an_sdk_says_that_is_no_timeout_means_none(text: str) -> None:
    assert told(("x-stainless-timeout", text)).deadline_at is None
    assert told(("x-stainless-read-timeout", text)).deadline_at is None


def test_malformed_read_timeout_leaves_the_sdks_other_word() -> None:
    call = told(("x-stainless-read-timeout", "NOT_GIVEN"), ("x-stainless-timeout", "10"))
    assert left_s(call) == 10.0


class NoUpload:
    async def readany(self) -> bytes:
        return b""

    async def hold(self) -> bytes:
        return b"held"


def test_sdk_waits_only_once_an_upload_is_sent_so_its_word_does_not_bound_it() -> None:
    sdk, own = ("x-stainless-timeout", "10"), ("x-request-timeout", "30")
    for headers, seconds in (((sdk,), inf), ((sdk, own), 30.0)):
        call = told(*headers)
        call.upload = NoUpload()
        assert left_s(call) == seconds


def test_deadline_is_read_from_the_headers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call = told(("x-request-timeout", "5"))
    assert left_s(call) == left_s(call) == 5.0
    none = told()
    assert none.deadline_at is None
    monkeypatch.delattr(call_module, "_timeout_s")
    assert left_s(call) == 5.0
    assert none.deadline_at is None


# Who calls


@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", "Bearer key-1"),
        ("authorization", "bearer  key-1 "),
        ("X-Api-Key", "key-1"),
        ("api-key", "key-1"),
    ],
)
def test_callers_key_is_known_by_the_beginning_of_its_digest(header: tuple[str, str]) -> None:
    call = told(header)
    assert call.key_id == sha256(b"key-1").hexdigest()[:16]
    assert key_of(call.headers) == "key-1"


@pytest.mark.parametrize(
    "headers", [(), (("authorization", "Basic a2V5"),), (("authorization", "Bearer "),)]
)
def test_caller_without_a_key_has_no_key_id(headers: tuple[tuple[str, str], ...]) -> None:
    assert told(*headers).key_id == ""


# Waiting for upstreams


def waited_s(*events: tuple[str, float]) -> float:
    call = told()
    for kind, at in events:
        (call.wait_begins if kind == "begins" else call.wait_ends)(at)
    return call.upstream_wait_s


def test_waits_one_after_the_other_add_up() -> None:
    assert waited_s(("begins", 1), ("ends", 3), ("begins", 10), ("ends", 11)) == 3


def test_waits_at_the_same_time_count_once() -> None:
    assert waited_s(("begins", 1), ("begins", 3), ("ends", 4), ("ends", 6)) == 5
    apart = [("begins", 1), ("begins", 2), ("ends", 3), ("ends", 4), ("begins", 8), ("ends", 9)]
    assert waited_s(*apart) == 4


def test_wait_that_ended_first_may_be_told_last() -> None:
    assert waited_s(("begins", 1), ("begins", 2), ("ends", 6), ("ends", 4)) == 5


@pytest.mark.parametrize("kind", ["upstream", "reply"])
def test_headers_that_could_end_the_line_are_refused(kind: str) -> None:
    call = call_of(b"")
    put = call.set_upstream_header if kind == "upstream" else call.set_reply_header
    for name, value in (
        ("x-a", "1\r\nx-b: 2"),
        ("x-a", "\0"),
        ("x a", "1"),
        ("x:", "1"),
        ("", "1"),
    ):
        with pytest.raises(ValueError, match="header"):
            put(name, value)
    put("X-A", "1")
    put("x-a", "2")
    fields = call.upstream_headers if kind == "upstream" else call.reply_headers
    assert fields == {b"x-a": b"2"}


def test_repr_has_no_header_and_no_body() -> None:
    call = Harness().call(
        {"model": "gpt-4o-mini", "messages": ["canary"]}, headers=[("authorization", "canary")]
    )
    assert repr(call) == "<Call call_1 POST /v1/chat/completions team=tests model=gpt-4o-mini>"
