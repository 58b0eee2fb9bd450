"""Every built-in filter against every kind of end: ends once, owes nothing, holds nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.contract.scenarios import SCENARIOS, Journal, Scenario
from tests.support.harness import Harness, Run, Use

pytestmark = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed now was freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_debts_are_paid_once_and_newest_first(
    use: Use, scenario: Scenario, journal: Journal
) -> None:
    async with scenario.harness(use, journal) as harness:
        await scenario.play(harness)
        await harness.settled()
    paid = [f"inner {scenario.call_end}", f"outer {scenario.call_end}"]
    assert journal.call_debts == paid
    assert journal.settled == paid
    if scenario.attempt_end is None:
        assert journal.attempt_debts == []
    else:
        end = scenario.attempt_end
        assert journal.attempt_debts == [f"inner {end}", f"outer {end}"]


async def test_bytes_pass_as_they_came(use: Use, scenario: Scenario, journal: Journal) -> None:
    async with scenario.harness(use, journal) as harness:
        client = (await scenario.play(harness)).client
        if scenario.data is None:
            assert client.error is not None
            assert client.status == client.error.status
            assert b'"error"' in client.data
        else:
            assert client.data == scenario.data
        if scenario.is_aborted:
            assert harness.upstream.source.asked.count("abort") == 1


async def test_no_task_is_left(use: Use, scenario: Scenario, journal: Journal) -> None:
    async with scenario.harness(use, journal) as harness:
        await scenario.play(harness)
        await harness.settled()
        assert len(harness.tasks) == 0


@pytest.mark.usefixtures("no_collector")
async def test_call_and_attempt_are_freed_without_the_collector(
    use: Use, scenario: Scenario, journal: Journal
) -> None:
    async with scenario.harness(use, journal) as harness:
        await scenario.play(harness)  # the run is dropped here, and with it the call
        await harness.settled()
        assert journal.canaries
        assert [ref() for ref in journal.canaries] == [None] * len(journal.canaries)


async def test_filter_that_claims_no_taps_is_in_nobodys_way(
    use: Use, scenario: Scenario, journal: Journal
) -> None:
    async with scenario.harness(use, journal) as harness:
        await scenario.play(harness)
    if not use.filter_class.taps_events:
        assert set(journal.stages) <= {0}
    else:
        assert set(journal.stages) <= {0, 1}


async def test_a_second_call_goes_as_well_as_the_first(
    use: Use, scenario: Scenario, journal: Journal
) -> None:
    async with scenario.harness(use, journal) as harness:
        first = await scenario.play(harness)
        second = await scenario.play(harness)
        assert _seen(first) == _seen(second)
        await harness.settled()
        assert len(harness.tasks) == 0


def _seen(run: Run) -> tuple[int, bytes, str]:
    assert run.call.end is not None
    data = run.client.data.replace(run.call.id.encode(), b"ID")
    return run.client.status, data, run.call.end.outcome


async def test_ending_again_changes_nothing(use: Use, scenario: Scenario, journal: Journal) -> None:
    async with scenario.harness(use, journal) as harness:
        run = await scenario.play(harness)
        end = run.call.end
        run.client_leaves()
        assert run.call.end is end
        await harness.settled()
    assert len(journal.call_debts) == 2


def test_scenarios_are_played_on_a_chain_around_the_filter(
    use: Use, scenario: Scenario, journal: Journal
) -> None:
    harness: Harness = scenario.harness(use, journal)
    assert use.filter_class in [type(each) for each in harness.filters]
