"""The fault drill in its short form, and that its verdict sees what it is there to see."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drill.accounts import Accounts
from drill.callers import CallRecord, Ending, judge
from drill.evidence import Evidence, Figures, Leftovers
from drill.plan import BOUNDED_TEAM, KINDS, SHORT, TEAMS, Kind, label_of
from drill.providers import Attempt, Ledger
from drill.verdict import checks, report
from sidecar.metrics import Metrics
from sidecar.mock.content import Told

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(120)
async def test_sidecars_keep_their_promises_while_providers_and_store_fail() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "drill", "--short"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode()
    assert process.returncode == 0, text
    assert text.splitlines()[-1].startswith("drill passed: "), text


# What a caller got

OPENAI_STREAM, OPENAI_PLAIN, ANTHROPIC_STREAM, ANTHROPIC_PLAIN = KINDS[:4]
JSON = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OPENAI_ERROR = b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}'
ANTHROPIC_ERROR = b'{"type":"error","error":{"type":"t","message":"m"}}'
OPENAI_ANSWER = b'{"choices":[{}],"usage":{"prompt_tokens":1}}'


def chunked(*pieces: bytes) -> bytes:
    return STREAM + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in pieces)


@pytest.mark.parametrize(
    ("kind", "data", "is_whole", "ending"),
    [
        (OPENAI_PLAIN, JSON % 200 + OPENAI_ANSWER, True, Ending.FULL),
        (OPENAI_PLAIN, JSON % 200 + b'{"choices":[{}]}', True, Ending.UNCLEAR),
        (OPENAI_PLAIN, JSON % 200 + OPENAI_ANSWER[:9], False, Ending.BROKEN),
        (OPENAI_PLAIN, JSON % 500 + OPENAI_ERROR, True, Ending.ERROR),
        (OPENAI_PLAIN, JSON % 500 + OPENAI_ERROR[:9], False, Ending.UNCLEAR),
        (OPENAI_PLAIN, JSON % 500 + b"Internal Server Error", True, Ending.UNCLEAR),
        (OPENAI_PLAIN, b"HTTP/1.1 200", False, Ending.LOST),
        (OPENAI_PLAIN, b"", False, Ending.LOST),
        (ANTHROPIC_PLAIN, JSON % 529 + ANTHROPIC_ERROR, True, Ending.ERROR),
        (ANTHROPIC_PLAIN, JSON % 529 + OPENAI_ERROR, True, Ending.UNCLEAR),
        (OPENAI_STREAM, chunked(b"data: {}\n\n", b"data: [DONE]\n\n"), True, Ending.FULL),
        (OPENAI_STREAM, chunked(b"data: {}\n\n", b"data: [DONE]\n\n"), False, Ending.UNCLEAR),
        (OPENAI_STREAM, chunked(b"data: {}\n\n"), False, Ending.UNCLEAR),
        (
            OPENAI_STREAM,
            chunked(b"data: {}\n\n", b"data: " + OPENAI_ERROR + b"\n\n"),
            False,
            Ending.BROKEN,
        ),
        (
            ANTHROPIC_STREAM,
            chunked(b"event: error\ndata: " + ANTHROPIC_ERROR + b"\n\n"),
            True,
            Ending.BROKEN,
        ),
        (ANTHROPIC_STREAM, chunked(b"data: " + ANTHROPIC_ERROR + b"\n\n"), True, Ending.UNCLEAR),
    ],
)
def test_answer_is_judged_as_an_sdk_of_its_dialect_would(
    kind: Kind, data: bytes, is_whole: bool, ending: Ending
) -> None:
    call = CallRecord(0, kind, "search", due_at=0.0)
    judge(call, data, is_whole=is_whole)
    assert call.ending is ending


def test_refusal_of_a_limit_is_known_by_its_code_and_says_when_to_try_again() -> None:
    call = CallRecord(0, OPENAI_PLAIN, "batch", due_at=0.0)
    error = OPENAI_ERROR.replace(b'"c"', b'"concurrency_limited"')
    judge(
        call, JSON.replace(b"\r\n\r\n", b"\r\nRetry-After: 1\r\n\r\n") % 429 + error, is_whole=True
    )
    assert (call.ending, call.is_refused, call.retry_after) == (Ending.ERROR, True, "1")


# The verdict


def good_evidence() -> Evidence:
    """A drill of one call of each kind and team, in which everything went well.

    Beside them, one caller left before the first byte, one in mid-stream, and one was refused.
    """
    calls: list[CallRecord] = []
    ledger = Ledger()
    accounts = Accounts()
    metrics = Metrics()
    settled = metrics.counter("llm_sidecar_budget_tokens", "", ("team", "kind", "source"))
    counted = metrics.counter("llm_api_tokens", "", ("model", "direction"))
    for team in TEAMS:
        for kind in KINDS:
            call = CallRecord(len(calls), kind, team, due_at=0.0, sent_at=1.0)
            call.first_byte_at, call.done_at, call.ending = 1.5, 2.0, Ending.FULL
            calls.append(call)
            ledger.attempts[call.number] = [
                attempt(1.0, None),
                attempt(1.2, Told(1, kind.words, 6)),
            ]
            label = label_of(kind.model)
            accounts.add(team, kind.model, 1, (kind.words, 6), (kind.words, 6))
            for direction, amount in (("input", kind.words), ("output", 6)):
                settled.child(team, direction, "reported").inc(amount)
                counted.child(label, direction).inc(amount)
    early = CallRecord(len(calls), OPENAI_PLAIN, "search", due_at=0.0, sent_at=1.0, done_at=1.3)
    ledger.attempts[early.number] = [attempt(1.1, None)]
    midway = CallRecord(early.number + 1, ANTHROPIC_STREAM, "search", due_at=0.0, sent_at=1.0)
    midway.first_byte_at, midway.done_at = 1.5, 1.6
    ledger.attempts[midway.number] = [attempt(1.4, Told(1, 5, 1))]
    for name, amount in (("input", 5), ("output", 1)):
        settled.child("search", name, "reported").inc(amount)
        counted.child("claude-flaky-*", name).inc(amount)
    accounts.add("search", midway.kind.model, 2, (5, 1), (5, 1))
    for call in (early, midway):
        call.ending = Ending.LEFT
        last = ledger.attempts[call.number][-1]
        last.is_answered, last.is_left = False, True
        calls.append(call)
    metrics.counter("llm_sidecar_budget_reservations", "", ("team",)).child("all").inc(len(calls))
    settlements = metrics.counter("llm_sidecar_budget_settlements", "", ("team", "source"))
    settlements.child("all", "reported").inc(len(calls))
    refused = CallRecord(len(calls), OPENAI_PLAIN, BOUNDED_TEAM, due_at=0.0, sent_at=1.0)
    refused.first_byte_at = refused.done_at = 1.1
    refused.ending, refused.status = Ending.ERROR, 429
    refused.code, refused.retry_after = "concurrency_limited", "1"
    calls.append(refused)
    limited = metrics.counter("llm_sidecar_limited", "", ("team", "rule"))
    limited.child(BOUNDED_TEAM, "concurrency").inc()
    changes = metrics.counter("llm_sidecar_circuit_transitions", "", ("upstream", "to"))
    changes.child("openai-falling", "open").inc()
    changes.child("openai-falling", "closed").inc()
    metrics.histogram("llm_sidecar_overhead_seconds", "").child().observe(0.001)
    for call in calls:
        call.due_at = call.sent_at - 0.001
    return Evidence(
        plan=SHORT,
        calls=calls,
        ledger=ledger,
        accounts=accounts,
        figures=Figures(metrics.snapshot()),
        leftovers=Leftovers(),
        log=[{"event": "circuit_opened", "level": "warning"}],
        outage=(3.0, 4.0),
        wall_s=8.0,
        cpu_s=[0.5, 0.5],
        exit_codes=[0, 0],
        stray_bytes=0,
    )


def attempt(arrived_at: float, told: Told | None) -> Attempt:
    """One that was answered, with an error if it told no usage."""
    return Attempt(
        arrived_at=arrived_at,
        began_at=None if told is None else arrived_at + 0.1,
        finished_at=arrived_at + 0.2,
        is_answered=True,
        is_left=False,
        told=told,
    )


def test_drill_without_a_fault_passes() -> None:
    evidence = good_evidence()
    found = list(checks(evidence))
    assert [check for check in found if not check.holds] == []
    assert report(evidence, found).splitlines()[-1].startswith("drill passed: 27 calls")


def _settle_twice(evidence: Evidence) -> None:
    evidence.ledger.attempts[0].pop()


def _serve_more(evidence: Evidence) -> None:
    evidence.ledger.attempts[0].append(attempt(1.3, Told(1, 1, 1)))


def _leave_out(evidence: Evidence) -> None:
    evidence.accounts.calls = len(evidence.calls) - 2


def _enter_refused(evidence: Evidence) -> None:
    evidence.accounts.calls = len(evidence.calls)


def _enter_less(evidence: Evidence) -> None:
    evidence.accounts.reported["search", "output"] -= 1


def _estimate_unseen(evidence: Evidence) -> None:
    evidence.accounts.used["gpt-flaky-*", "input"] += 1


def _hold(evidence: Evidence) -> None:
    evidence.leftovers.slots = 1


def _log(evidence: Evidence) -> None:
    evidence.log.append({"event": "debt_failed", "level": "error"})


def _exit(evidence: Evidence) -> None:
    evidence.exit_codes[1] = 3


def _never_close(evidence: Evidence) -> None:
    metrics = Metrics()
    changes = metrics.counter("llm_sidecar_circuit_transitions", "", ("upstream", "to"))
    changes.child("openai-falling", "open").inc()
    evidence.figures = Figures(metrics.snapshot())


def _fail(evidence: Evidence) -> None:
    evidence.calls[0].ending = Ending.ERROR


def _leave_in_doubt(evidence: Evidence) -> None:
    evidence.calls[0].ending = Ending.UNCLEAR


def _hang(evidence: Evidence) -> None:
    evidence.calls[0].done_at = evidence.calls[0].sent_at + SHORT.deadline_s + 2


def _try_late(evidence: Evidence) -> None:
    evidence.ledger.attempts[0].append(attempt(1.6, None))


def _begin_twice(evidence: Evidence) -> None:
    evidence.ledger.attempts[0][0].began_at = 1.1


def _make_up(evidence: Evidence) -> None:
    del evidence.ledger.attempts[0]


def _dawdle(evidence: Evidence) -> None:
    evidence.calls[0].due_at = evidence.calls[0].sent_at - 1.0


def _only(evidence: Evidence, ending: Ending, *, early: bool = False) -> CallRecord:
    (call,) = (c for c in evidence.calls if c.ending is ending and c.left_early is early)
    return call


def _reserve_for_nobody(evidence: Evidence) -> None:
    evidence.calls.remove(_only(evidence, Ending.LEFT, early=True))


def _reserve_for_refused(evidence: Evidence) -> None:
    _only(evidence, Ending.LEFT, early=True).code = "concurrency_limited"


def _forget_what_a_leaver_was_told(evidence: Evidence) -> None:
    call = _only(evidence, Ending.LEFT)
    evidence.ledger.attempts[call.number] = [attempt(1.4, Told(9, 5, 6))]


def _work_on(evidence: Evidence) -> None:
    call = _only(evidence, Ending.LEFT, early=True)
    evidence.ledger.attempts[call.number][-1].finished_at = call.done_at + 1.0


def _try_for_a_leaver(evidence: Evidence) -> None:
    call = _only(evidence, Ending.LEFT, early=True)
    evidence.ledger.attempts[call.number].append(attempt(call.done_at + 1.0, None))


def _stay_early(evidence: Evidence) -> None:
    _only(evidence, Ending.LEFT, early=True).ending = Ending.ERROR


def _stay_midway(evidence: Evidence) -> None:
    _only(evidence, Ending.LEFT).ending = Ending.BROKEN


def _refuse_nobody(evidence: Evidence) -> None:
    evidence.calls.remove(_only(evidence, Ending.ERROR))


def _refuse_another_team(evidence: Evidence) -> None:
    _only(evidence, Ending.ERROR).team = "search"


def _refuse_for_good(evidence: Evidence) -> None:
    _only(evidence, Ending.ERROR).retry_after = ""


def _refuse_and_send_on(evidence: Evidence) -> None:
    number = _only(evidence, Ending.ERROR).number
    evidence.ledger.attempts[number] = [attempt(1.05, None)]


def _count(evidence: Evidence, team: str, rule: str, number: int) -> None:
    metrics = Metrics()
    limited = metrics.counter("llm_sidecar_limited", "", ("team", "rule"))
    limited.child(team, rule).inc(number)
    evidence.figures = Figures(metrics.snapshot())


def _refuse_uncounted(evidence: Evidence) -> None:
    _count(evidence, BOUNDED_TEAM, "concurrency", 0)


def _count_refusals_nobody_saw(evidence: Evidence) -> None:
    _count(evidence, BOUNDED_TEAM, "concurrency", 3)


def _limit_otherwise(evidence: Evidence) -> None:
    limited = evidence.figures.by("llm_sidecar_limited", "team", "rule")
    metrics = Metrics()
    counter = metrics.counter("llm_sidecar_limited", "", ("team", "rule"))
    for (team, rule), number in [*limited.items(), (("search", "tokens_per_minute"), 1)]:
        counter.child(team, rule).inc(number)
    evidence.figures = Figures(metrics.snapshot())


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        (_settle_twice, "settled usage of search"),
        (_serve_more, "settled usage of search"),
        (_leave_out, "each call that a provider saw is in the ledger once"),
        (_enter_refused, "each call that a provider saw is in the ledger once"),
        (_enter_less, "the ledger has of search what the provider reported"),
        (_serve_more, "the ledger has of search what the provider reported"),
        (_serve_more, "the ledger has of gpt-flaky-* what the provider reported"),
        (_serve_more, "counted usage of gpt-flaky-* is that of the ledger"),
        (_estimate_unseen, "counted usage of gpt-flaky-* is that of the ledger"),
        (_hold, "nothing is held at rest"),
        (_log, "no task, debt or settlement failed"),
        (_exit, "the sidecars stopped with nothing open"),
        (_never_close, "the breaker of the falling provider"),
        (_fail, "at least 99.5% of the calls"),
        (_leave_in_doubt, "every other call got a clear error"),
        (_hang, "no call hung past its deadline"),
        (_try_late, "nothing was tried again after its first byte"),
        (_begin_twice, "nothing was tried again after its first byte"),
        (_make_up, "every answer is in the provider's books"),
        (_dawdle, "the callers held their rate"),
        (_reserve_for_nobody, "each reservation was settled once"),
        (_reserve_for_refused, "each reservation was settled once"),
        (_forget_what_a_leaver_was_told, "settled usage of search"),
        (_work_on, "no provider works on for a caller who left"),
        (_try_for_a_leaver, "no provider works on for a caller who left"),
        (_stay_early, "no provider works on for a caller who left"),
        (_stay_midway, "no provider works on for a caller who left"),
        (_refuse_nobody, "the limit of batch refused calls"),
        (_refuse_another_team, "the limit of batch refused calls"),
        (_refuse_for_good, "the limit of batch refused calls"),
        (_refuse_and_send_on, "the limit of batch refused calls"),
        (_refuse_uncounted, "the limit of batch refused calls"),
        (_count_refusals_nobody_saw, "the limit of batch refused calls"),
        (_limit_otherwise, "the limit of batch refused calls"),
    ],
)
def test_verdict_names_the_promise_that_a_fault_breaks(
    fault: Callable[[Evidence], None], promise: str
) -> None:
    evidence = good_evidence()
    fault(evidence)
    broken = [check.promise for check in checks(evidence) if not check.holds]
    assert any(each.startswith(promise) for each in broken), broken


def test_calls_that_nobody_could_answer_are_not_asked_for() -> None:
    evidence = good_evidence()
    broken = evidence.calls[0]
    broken.ending = Ending.BROKEN
    last = evidence.ledger.attempts[0][-1]
    last.is_answered = False
    evidence.outage = (0.5, 1.0 + SHORT.deadline_s)
    for call in evidence.calls:
        if call.kind.provider == "falling":
            call.ending = Ending.ERROR
    (check,) = (each for each in checks(evidence) if each.promise.startswith("at least"))
    assert check.holds
    assert check.figures == "11 of 11, 100.000%"


def test_who_left_or_was_refused_is_counted_and_not_asked_for() -> None:
    evidence = good_evidence()
    figures = {check.promise: check.figures for check in checks(evidence)}
    (answered,) = (text for promise, text in figures.items() if promise.startswith("at least"))
    (left,) = (text for promise, text in figures.items() if "who left" in promise)
    (refused,) = (text for promise, text in figures.items() if "the limit of" in promise)
    assert answered == "24 of 24, 100.000%"
    assert left.startswith("1 left before the first byte, 1 in mid-stream")
    assert refused.startswith("1 refused, 1 of them 429 with Retry-After")


def test_who_left_early_need_not_have_been_seen() -> None:
    evidence = good_evidence()
    evidence.calls.append(replace(_only(evidence, Ending.LEFT, early=True), number=99))
    assert [check for check in checks(evidence) if not check.holds] == []


def test_broken_stream_that_told_its_usage_is_settled_with_what_it_told() -> None:
    evidence = good_evidence()
    number = next(c.number for c in evidence.calls if c.kind is ANTHROPIC_STREAM)
    evidence.ledger.attempts[number][-1].is_answered = False
    (check,) = (
        each for each in checks(evidence) if each.promise.startswith("settled usage of search")
    )
    assert check.holds, check.figures
