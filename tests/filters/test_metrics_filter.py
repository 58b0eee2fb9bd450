"""What is counted, under which labels, and that what is open closes."""

from __future__ import annotations

import pytest

from filters.metrics import CallMetrics
from filters.token_counter import TokenCounter
from sidecar.api import Attempt, Outcome, Rejected, Reply
from tests.contract.scenarios import FIRST, SCENARIOS, Scenario
from tests.support.harness import MODEL, Harness

PLACE = {"model": MODEL, "upstream": "fake", "team": "tests"}
USAGE = b'{"usage": {"prompt_tokens": 30, "completion_tokens": 20}}'


def calls(harness: Harness, status: int, outcome: str, **place: str) -> float:
    labels = {**PLACE, **place, "status": str(status), "outcome": outcome}
    found: float = harness.value("llm_api_requests", **labels)
    return found


def label_values(harness: Harness) -> dict[str, set[str]]:
    """Every value of every label that any metric has."""
    values: dict[str, set[str]] = {}
    for family in harness.metrics.snapshot():
        for sample, _ in family["samples"]:
            for label, value in zip(family["labels"], sample, strict=True):
                values.setdefault(label, set()).add(value)
    return values


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_every_end_is_counted_once_and_leaves_no_call_open(scenario: Scenario) -> None:
    async with Harness(*scenario.before, CallMetrics, *scenario.after) as harness:
        run = await scenario.play(harness)
        assert harness.value("llm_api_open_calls", team="tests") == 0
    is_placed = scenario.name != "refused_by_the_edge"
    place = {} if is_placed else {"model": "-", "upstream": "-"}
    assert calls(harness, run.client.status, scenario.call_end, **place) == 1
    ends = label_values(harness)
    assert ends["outcome"] == {scenario.call_end}
    assert ends["team"] == {"tests"}
    model = place.get("model", MODEL)
    assert harness.value("llm_api_request_latency_seconds", model=model) == 1


async def test_calls_are_open_while_they_stream() -> None:
    async with Harness(CallMetrics) as harness:
        harness.upstream.answer = harness.upstream.stream(FIRST)
        runs = [harness.start() for _ in range(3)]
        for run in runs:
            await run.begun()
        assert harness.value("llm_api_open_calls", team="tests") == 3
        for run in runs:
            run.client_leaves()
            await run.ended()
        assert harness.value("llm_api_open_calls", team="tests") == 0
    assert calls(harness, 200, Outcome.CLIENT_GONE) == 3


async def test_bytes_are_counted_in_both_directions() -> None:
    async with Harness(CallMetrics) as harness:
        run = await harness.run()
    count = harness.value
    assert count("llm_api_body_bytes", **PLACE, direction="in") == run.call.bytes_in > 0
    assert count("llm_api_body_bytes", **PLACE, direction="out") == len(run.client.data) > 0


async def test_tokens_are_counted_as_the_provider_reports_them() -> None:
    async with Harness(CallMetrics, TokenCounter) as harness:
        harness.upstream.answer = harness.upstream.whole(USAGE)
        await harness.run()
        await harness.run()
    assert harness.value("llm_api_tokens", **PLACE, direction="input") == 60
    assert harness.value("llm_api_tokens", **PLACE, direction="output") == 40
    assert calls(harness, 200, Outcome.COMPLETED) == 2


async def test_times_of_one_call() -> None:
    async with Harness(CallMetrics) as harness:

        async def answer(attempt: Attempt) -> Reply:
            attempt.first_byte_at = attempt.started_at + 3.0
            harness.clock.turn(3.25)
            return await stream(attempt)

        stream = harness.upstream.stream(FIRST)
        harness.upstream.answer = answer
        run = harness.start()
        await run.begun()
        harness.clock.turn(2.0)
        harness.upstream.source.finish()
        await run.ended()
    sums = {
        family["name"]: family["samples"][0][1][-1]
        for family in harness.metrics.snapshot()
        if family["kind"] == "histogram"
    }
    assert sums["llm_api_time_to_first_byte_seconds"] == pytest.approx(3.25)
    assert sums["llm_api_request_latency_seconds"] == pytest.approx(5.25)
    assert sums["llm_sidecar_overhead_seconds"] == pytest.approx(0.25)  # not the upstream's 3 s


async def test_client_that_left_before_the_answer_has_no_first_byte() -> None:
    async with Harness(CallMetrics) as harness:
        harness.upstream.answer = harness.upstream.silent()
        run = harness.start()
        await harness.upstream.asked.wait()
        run.client_leaves()
        await run.ended()
    assert harness.value("llm_api_time_to_first_byte_seconds", model=MODEL) == 0
    assert harness.value("llm_api_request_latency_seconds", model=MODEL) == 1


async def test_labels_come_from_the_configuration_alone() -> None:
    async with Harness(CallMetrics) as harness:
        for i in range(50):
            refusal = Rejected(404, "model_not_found", "no such model")
            call = harness.call(path=f"/v1/models/made-up-{i}", refusal=refusal, method=f"M{i}")
            call.model, call.label = f"made-up-{i}", "unknown"
            await harness.run(call)
        await harness.run(harness.call(b"", method="GET", path="/v1/models"))
    assert label_values(harness) == {
        "model": {"unknown", "-"},
        "upstream": {"-"},
        "team": {"tests"},
        "status": {"404", "200"},
        "outcome": {Outcome.REJECTED, Outcome.COMPLETED},
        "direction": {"in", "out", "input", "output"},
    }


@pytest.mark.parametrize("status", [0, 7, 600, 999])
async def test_status_that_is_none_is_counted_as_0(status: int) -> None:
    async with Harness(CallMetrics) as harness:
        harness.upstream.answer = harness.upstream.whole(b"{}", status=status)
        await harness.run()
    assert calls(harness, 0, Outcome.COMPLETED) == 1


async def test_two_filters_of_two_snapshots_count_into_the_same_metrics() -> None:
    async with Harness(CallMetrics, CallMetrics) as harness:
        await harness.run()
    assert calls(harness, 200, Outcome.COMPLETED) == 2
