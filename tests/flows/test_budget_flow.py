"""Budgets over real sockets: what the official SDKs are told, and what gets to the provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import yaml

from tests.support.flow import CHAT, HELLO, Flow, Start, chat_body, request, running, until
from tests.support.valkey import Valkey

PRICES = {
    "gpt": {"input": 1000, "output": 1000},
    "small-1": {"input": 1, "output": 1},
    "claude": {"input": 1000, "output": 1000},
}
"""For a million tokens: one costs 0.001."""


def chain(**budget: Any) -> str:
    """A configuration with this budget."""
    return yaml.safe_dump(
        {
            "filters": {"cost": {"prices": PRICES}, "budget": budget},
            "chains": {
                "default": {"call": ["cost", "budget", "token_counter"], "attempt": ["sign"]}
            },
            "models": {"small": [{"upstream": "up-openai", "model": "small-1"}]},
        }
    )


def asked(flow: Flow) -> int:
    """How many requests the provider got."""
    return len(flow.provider.books.requests)


def served(flow: Flow) -> int:
    """Tokens that the provider has told of."""
    told = [each.told for each in flow.provider.books.requests]
    return sum(each.input_tokens + each.output_tokens for each in told if each is not None)


async def budgets(flow: Flow) -> dict[str, Any]:
    """What the panel shows, by name; of a budget with a warning the limit itself."""
    panel = flow.server._resources.of_kind("panel")["budget"]
    return {row["budget"]: row for row in await panel.show() if row["then"] != "warn"}


async def chat(flow: Flow, *, retries: int = 0, **more: Any) -> None:
    async with flow.openai() as client:
        answer: Any = await client.with_options(max_retries=retries).chat.completions.create(
            **{"model": "gpt", "messages": HELLO, "max_tokens": 20, **more}
        )
        if more.get("stream"):
            assert [each async for each in answer]


async def test_sdks_are_told_once_that_the_budget_is_used_up(start: Start) -> None:
    flow = await start(chain(tokens_per_day=60))
    await chat(flow)
    with pytest.raises(openai.APIStatusError) as of_openai:
        await chat(flow, retries=3, max_tokens=60)
    before = asked(flow)
    assert before == 1
    assert (of_openai.value.status_code, of_openai.value.code) == (402, "budget_exceeded")
    assert "60 tokens a day" in str(of_openai.value)
    assert "begins anew at" in str(of_openai.value)
    async with flow.anthropic() as client:
        with pytest.raises(anthropic.APIStatusError) as of_anthropic:
            await client.with_options(max_retries=3).messages.create(
                model="claude", max_tokens=60, messages=HELLO
            )
    assert of_anthropic.value.status_code == 402
    assert of_anthropic.value.body["error"]["type"] == "billing_error"  # type: ignore[index]
    assert asked(flow) == before


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_spent_is_what_the_provider_served(start: Start, stream: bool) -> None:
    flow = await start(chain(tokens_per_day=10**6, usd_per_month=1000.0))
    more: dict[str, Any] = {"stream": True} if stream else {}
    for tokens in (5, 11):
        await chat(flow, max_tokens=tokens, **more)
        async with flow.anthropic() as client:
            said: Any = await client.messages.create(
                model="claude", max_tokens=9, messages=HELLO, **more
            )
            if stream:
                assert [each async for each in said]
    await flow.quiet()
    shown = await budgets(flow)
    assert shown["tokens_per_day"]["spent"] == served(flow)
    assert shown["usd_per_month"]["spent"] == pytest.approx(served(flow) / 1000)
    assert {row["reserved"] for row in shown.values()} == {0}


async def test_parallel_streams_cannot_overrun_a_budget(start: Start) -> None:
    flow = await start(chain(usd_per_day=1.0))
    body = chat_body(stream=True, max_tokens=400)
    data = request("POST", CHAT, body, {"x-mock-hang": "events:1"})
    clients = [await flow.connect() for _ in range(5)]
    for client in clients:
        client.send(data)
    statuses = [(await client.head()).status for client in clients]
    assert sorted(statuses) == [200, 200, 402, 402, 402]
    assert asked(flow) == 2
    for client in clients:
        client.leave()
    await flow.quiet()
    assert (await budgets(flow))["usd_per_day"]["reserved"] == 0


@pytest.fixture(params=["memory", "shared"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A line of the configuration: where budgets are counted."""
    if request.param == "memory":
        yield ""
        return
    monkeypatch.setattr("filters.stores.redis.ANSWER_S", 20.0)
    with Valkey() as valkey:
        yield f"store: '{valkey.url}'\n"


async def test_a_budget_that_gets_low_leads_to_the_cheaper_model(start: Start, store: str) -> None:
    limit = {"usd": 0.2, "per": "day"}
    degrade = {**limit, "then": "degrade", "to": "small", "at": 0.4}
    flow = await start(store + chain(limits=[degrade, limit], output_reserve=10))
    models = []
    for _ in range(12):
        async with flow.openai() as client:
            raw = await client.chat.completions.with_raw_response.create(
                model="gpt", messages=HELLO, max_tokens=30
            )
        models.append((raw.headers.get("x-sidecar-degraded"), raw.parse().model))
    assert models[0] == (None, "gpt")
    assert models[-1] == ("small", "small-1")
    with pytest.raises(openai.APIStatusError) as caught:
        await chat(flow, max_tokens=200_000)
    assert "0.2 USD a day has" in str(caught.value)
    assert 0.0 < (await budgets(flow))["usd_per_day"]["spent"] < 0.2


async def test_spending_survives_a_restart(tmp_path: Path) -> None:
    config = "data_dir: kept\n" + chain(tokens_per_week=10**6)
    spent = 0
    for number in range(3):
        async with running(tmp_path, config) as flow:
            await chat(flow)
            await flow.quiet()
            spent += served(flow)
            assert (await budgets(flow))["tokens_per_week"]["spent"] == spent, number
    assert (tmp_path / "kept" / "budgets.db").stat().st_mode & 0o077 == 0


async def test_sidecars_with_one_data_directory_see_each_other_s_spending(tmp_path: Path) -> None:
    config = f"data_dir: {tmp_path / 'kept'}\n" + chain(tokens_per_day=10**6)
    async with AsyncExitStack() as stack:
        flows = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            flows.append(await stack.enter_async_context(running(tmp_path / name, config)))
        for flow in flows:
            await chat(flow)
        total = sum(map(served, flows))
        async with asyncio.timeout(10.0):
            for flow in flows:
                # They look at the file every second.
                while (await budgets(flow))["tokens_per_day"]["spent"] != total:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


@pytest.fixture
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Flow]]:
    """Two sidecars that share one store, which is not taken for dead on a busy machine."""
    monkeypatch.setattr("filters.stores.redis.ANSWER_S", 20.0)
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(Valkey())
        flows = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            config = f"store: '{valkey.url}'\n" + chain(tokens_per_day=1000, warn_at=None)
            flows.append(await stack.enter_async_context(running(tmp_path / name, config)))
        yield flows


async def test_sidecars_that_share_a_store_never_spend_more_together(two: list[Flow]) -> None:
    data = request("POST", CHAT, chat_body(max_tokens=20))
    answers = await asyncio.gather(*[flow.call(data) for _ in range(40) for flow in two])
    statuses = {answer.status for answer in answers}
    assert statuses == {200, 402}
    for flow in two:
        await flow.quiet()
    total = sum(map(served, two))
    assert total <= 1000

    async def is_settled() -> bool:
        rows = [(await budgets(flow))["tokens_per_day"] for flow in two]
        return all((row["spent"], row["reserved"]) == (total, 0) for row in rows)

    async with asyncio.timeout(5.0):
        while not await is_settled():
            pass  # it is told beside the calls
    await until(lambda: not any(flow.running() for flow in two))
