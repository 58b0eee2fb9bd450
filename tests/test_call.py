"""Scopes and their debts, ends and whose fault they are, and the request's JSON."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
import pytest

from sidecar import call as call_module
from sidecar.call import USAGE, Call, End, Key, Outcome, Scope, Usage, completed, end_of
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
