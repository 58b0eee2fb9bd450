"""Several processes on one store keep one limit and one circuit, whatever becomes of them.

Real processes, a real server, and the scripted provider in the test's own process: what it got is
what was let through. On a busy machine the server may seem away for a moment. So most tests let
nothing through then (`closed`), and call again: what they count is what the store decided.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest

from filters.stores.redis import LEASE_S
from sidecar.mock import MockProvider
from tests.support.flow import Answer, RawClient, chat_request
from tests.support.process import SidecarProcess, becomes, serving, write_config
from tests.support.valkey import Valkey

CALL = chat_request(x_mock_events="1")
FAILING_CALL = chat_request(x_mock_status="503")
STREAM = chat_request(stream=True, x_mock_hang="events:1")
"""Stays open until its caller leaves."""

MINUTE_S = 60.0
AWAY_S = 0.02
"""Before a call is made again that the store gave no answer for."""


class Site:
    """Running sidecars, the store that they share if they do, and the provider behind them."""

    def __init__(
        self,
        provider: MockProvider,
        store: Valkey | None,
        sidecars: Sequence[SidecarProcess],
        admin: aiohttp.ClientSession,
    ) -> None:
        self.provider = provider
        self._store = store
        self.sidecars = sidecars
        self._admin = admin
        self._clients: list[RawClient] = []

    @property
    def store(self) -> Valkey:
        assert self._store is not None
        return self._store

    @property
    def passed(self) -> int:
        """Calls that came to the provider."""
        return self.provider.books.total.calls

    # Calls

    async def connect(self, sidecar: SidecarProcess) -> RawClient:
        host, _, port = sidecar.address.rpartition(":")
        client = RawClient(*await asyncio.open_connection(host, int(port)))
        self._clients.append(client)
        return client

    async def call(self, sidecar: SidecarProcess, request: bytes = CALL) -> Answer:
        """One call on a connection of its own, as the store decides."""
        client = await self.connect(sidecar)
        try:
            return await decided(client, request)
        finally:
            client.leave()

    async def spend(
        self, calls: Iterator[object], connections: int, *sidecars: SidecarProcess
    ) -> Counter[int]:
        """The statuses of a call for each of `calls`, as fast as they go: over so many connections,
        to each sidecar in turn."""
        clients = [await self.connect(each) for each, _ in zip(cycle(sidecars), range(connections))]
        statuses: Counter[int] = Counter()

        async def make_calls(client: RawClient) -> None:
            for _ in calls:  # what another connection has taken is not there any more
                statuses[(await decided(client, CALL)).status] += 1
            client.leave()

        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(make_calls(client))
        return statuses

    async def stream(self, sidecar: SidecarProcess) -> RawClient | None:
        """A stream that has begun; None if it was refused."""
        client = await self.connect(sidecar)
        client.send(STREAM)
        if (await client.head()).status == 200:
            await client.until(b"\n\n")
            return client
        client.leave()
        return None

    async def hold(self, sidecar: SidecarProcess, count: int) -> list[RawClient]:
        """So many streams, once there is room for all."""
        held: list[RawClient] = []

        async def are_open() -> bool:
            if (client := await self.stream(sidecar)) is not None:
                held.append(client)
            return len(held) == count

        await becomes(are_open)
        return held

    async def has_room_for(self, sidecar: SidecarProcess, count: int) -> None:
        """Return once it lets so many streams in and not one more; they end again."""

        async def found() -> bool:
            opened = []
            for _ in range(count + 1):
                if (client := await self.stream(sidecar)) is not None:
                    opened.append(client)
            for client in opened:
                client.leave()
            await self.provider.wait_for(lambda: self.provider.open_requests <= others)
            return len(opened) == count

        others = self.provider.open_requests
        await becomes(found)

    # What operators see and do

    async def figure(self, sidecar: SidecarProcess, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        async with self._admin.get(f"{sidecar.admin_url}/metrics.json") as answer:
            families = {each["name"]: each for each in await answer.json()}
        family = families[name]
        samples = [
            (dict(zip(family["labels"], key, strict=True)), n) for key, n in family["samples"]
        ]
        return float(sum(n for each, n in samples if labels.items() <= each.items()))

    async def sees_store(self, processes: int) -> None:
        """Return once so many processes have their store."""

        async def all_do() -> bool:
            up = [await self.figure(each, "llm_sidecar_store_up") for each in self.sidecars]
            return sum(up) == processes

        await becomes(all_do)

    async def circuits(self, sidecar: SidecarProcess) -> list[Any]:
        """Upstream, state and forced state of each circuit."""
        async with self._admin.get(f"{sidecar.admin_url}/state/circuits") as answer:
            (found,) = (await answer.json())["workers"]
        return [tuple(each[name] for name in ("upstream", "state", "forced")) for each in found]

    async def all_see(self, state: str, forced: str | None = None) -> None:
        """Return once every process shows the one circuit like this."""

        async def do() -> bool:
            shown = [await self.circuits(each) for each in self.sidecars]
            return shown == [[("openai", state, forced)]] * len(shown)

        await becomes(do)

    async def force(self, sidecar: SidecarProcess, model: str, state: str | None) -> None:
        """Hold the circuit of this model, or of all, in a state."""
        command = {"upstream": "openai", "model": model, "force": state}

        async def is_done() -> bool:
            async with self._admin.post(
                f"{sidecar.admin_url}/state/circuits", json=command
            ) as answer:
                return answer.status == 200

        await becomes(is_done)

    def leave(self) -> None:
        for client in self._clients:
            client.leave()


async def decided(client: RawClient, request: bytes) -> Answer:
    """The answer to a call, made again while the store is away."""
    while (answer := await client.call(request)).status == 503:
        if answer.error["code"] != "store_unavailable":
            break
        await asyncio.sleep(AWAY_S)
    return answer


@asynccontextmanager
async def running(
    folder: Path,
    filters: str,
    *,
    sidecars: int = 1,
    workers: int = 1,
    has_store: bool = True,
) -> AsyncIterator[Site]:
    """Sidecars whose chain is `rate_limit` and `circuit_breaker`, with these settings."""
    async with AsyncExitStack() as stack:
        store = stack.enter_context(Valkey()) if has_store else None
        provider = MockProvider(keep_requests=0)
        stack.push_async_callback(provider.stop)
        config = write_config(
            folder,
            f"store: {'memory' if store is None else store.url}\n"
            f"workers: {workers}\n"
            "chains: {default: {call: [rate_limit], attempt: [circuit_breaker]}}\n"
            f"filters: {filters}\n",
            upstream=await provider.start(),
        )
        processes = [await stack.enter_async_context(serving(config)) for _ in range(sidecars)]
        admin = await stack.enter_async_context(aiohttp.ClientSession())
        site = Site(provider, store, processes, admin)
        stack.callback(site.leave)
        if has_store:
            await site.sees_store(sidecars * workers)
        yield site
        site.leave()
        for process in processes:
            if process.process.returncode is None:
                assert await process.end() == 0
            assert not process.errors
            assert [line for line in process.log if line["level"] == "error"] == []


# One limit


async def test_ten_thousand_calls_over_two_processes_do_not_exceed_their_limit(
    tmp_path: Path,
) -> None:
    calls, limit, connections = 10_000, 4_000, 64
    settings = f"{{requests_per_minute: {limit}, when_store_is_down: closed}}"
    async with running(tmp_path, f"{{rate_limit: {settings}}}", sidecars=2) as site:
        began = monotonic()
        statuses = await site.spend(iter(range(calls)), connections, *site.sidecars)
        assert monotonic() - began < MINUTE_S  # all of them were in one window
        assert statuses.keys() == {200, 429}
        assert statuses.total() == calls
        assert site.passed == statuses[200]
        assert limit - connections <= site.passed <= limit


async def test_two_workers_without_a_store_grant_half_of_the_limit_each(tmp_path: Path) -> None:
    limit = 400
    settings = f"{{rate_limit: {{requests_per_minute: {limit}}}}}"
    async with running(tmp_path, settings, workers=2, has_store=False) as site:
        one_worker = await site.spend(iter(range(limit)), 1, *site.sidecars)  # it is one connection
        assert one_worker == {200: limit // 2, 429: limit // 2}
        statuses = await site.spend(iter(range(5 * limit)), 40, *site.sidecars)
        assert statuses[200] == limit // 2
        assert site.passed == limit


async def test_two_workers_with_a_store_share_their_limit(tmp_path: Path) -> None:
    limit = 100
    settings = f"{{requests_per_minute: {limit}, when_store_is_down: closed}}"
    async with running(tmp_path, f"{{rate_limit: {settings}}}", workers=2) as site:
        one_worker = await site.spend(iter(range(limit - 1)), 1, *site.sidecars)
        assert one_worker == {200: limit - 1}  # more than its half
        statuses = await site.spend(iter(range(5 * limit)), 40, *site.sidecars)
        assert statuses[200] <= 1
        assert statuses[429] >= 5 * limit - 1
        assert site.passed <= limit


# A process that dies


async def test_slots_of_a_killed_process_come_back_to_the_other_when_its_lease_ends(
    tmp_path: Path,
) -> None:
    slots = 6
    settings = f"{{concurrency: {slots}, when_store_is_down: closed}}"
    async with running(tmp_path, f"{{rate_limit: {settings}}}", sidecars=2) as site:
        dying, living = site.sidecars
        await site.hold(living, 1)
        await site.hold(dying, slots - 1)
        dying.tell(signal.SIGKILL)
        died_at = monotonic()
        await dying.wait()
        refusal = await site.call(living)
        assert (refusal.status, refusal.error["code"]) == (429, "concurrency_limited")
        await site.has_room_for(living, slots - 1)
        assert monotonic() - died_at < LEASE_S + 2.0


# One circuit


async def test_circuit_that_one_process_opened_refuses_in_the_other_and_obeys_in_both(
    tmp_path: Path,
) -> None:
    threshold = 3
    settings = f"{{failure_threshold: {threshold}, when_store_is_down: closed}}"
    async with running(tmp_path, f"{{circuit_breaker: {settings}}}", sidecars=2) as site:
        first, second = site.sidecars
        while (answer := await site.call(first, FAILING_CALL)).error["code"] != "circuit_open":
            assert answer.status == 503
        assert site.passed >= threshold
        passed = site.passed
        answer = await site.call(second)
        assert (answer.status, answer.error["code"]) == (503, "circuit_open")
        assert site.passed == passed
        await site.all_see("open")

        await site.force(second, "gpt", "closed")
        await site.all_see("closed", forced="closed")
        for sidecar in (first, second):
            for _ in range(threshold + 1):  # it does not even open
                answer = await site.call(sidecar, FAILING_CALL)
                assert answer.error["code"] != "circuit_open"
        assert site.passed == passed + 2 * (threshold + 1)

        await site.force(first, "*", None)
        await site.all_see("closed")
        await site.force(first, "*", "open")
        await site.all_see("open", forced="open")
        assert (await site.call(second)).error["code"] == "circuit_open"


# A store that is away


@pytest.mark.parametrize(
    ("when_down", "status"), [("open", 200), ("closed", 503), ("local_share", 200)]
)
async def test_store_that_hangs_delays_one_call_and_is_shared_again_when_it_answers(
    tmp_path: Path, when_down: str, status: int
) -> None:
    slots, more = 4, 20
    settings = f"{{concurrency: {slots}, when_store_is_down: {when_down}}}"
    async with running(tmp_path, f"{{rate_limit: {settings}}}", sidecars=2) as site:
        labels = {"use": "limits", "answer": when_down}
        clients = [await site.connect(each) for each in site.sidecars]
        for client in clients:
            assert (await decided(client, CALL)).status == 200
        fallbacks = [
            await site.figure(each, "llm_sidecar_store_fallbacks", **labels)
            for each in site.sidecars
        ]

        site.store.pause()
        for client in clients:
            began = monotonic()
            assert (await client.call(CALL)).status == status
            assert monotonic() - began < 0.5
            began = monotonic()
            for _ in range(more):
                assert (await client.call(CALL)).status == status
            assert monotonic() - began < 0.5  # had each waited, it would be twice that
        await site.sees_store(0)
        for sidecar, before in zip(site.sidecars, fallbacks, strict=True):
            now = await site.figure(sidecar, "llm_sidecar_store_fallbacks", **labels)
            assert now - before == 1 + more

        site.store.resume()
        await site.sees_store(2)
        first, second = site.sidecars
        held = await site.hold(first, slots)

        async def refuses() -> bool:
            return (await site.call(second)).status == 429

        await becomes(refuses)
        for client in held:
            client.leave()
        await site.has_room_for(second, slots)


async def test_store_that_restarts_empty_while_calls_run_leaves_no_slot_taken(
    tmp_path: Path,
) -> None:
    slots = 6
    settings = f"{{concurrency: {slots}, when_store_is_down: local_share}}"
    async with running(tmp_path, f"{{rate_limit: {settings}}}", sidecars=2) as site:
        first, second = site.sidecars
        before = [*await site.hold(first, 2), *await site.hold(second, 1)]
        is_over = asyncio.Event()
        until_over = iter(is_over.is_set, True)
        async with asyncio.TaskGroup() as group:
            short_calls = group.create_task(site.spend(until_over, 8, *site.sidecars))
            await site.provider.wait_for(lambda: site.passed > 100)
            site.store.stop()
            await site.sees_store(0)
            before.pop(0).leave()  # which nobody can tell the store
            local = await site.hold(first, 1)  # of which the store has not heard
            passed = site.passed
            await site.provider.wait_for(lambda: site.passed > passed + 100)
            site.store.start()
            await site.sees_store(2)
            passed = site.passed
            await site.provider.wait_for(lambda: site.passed > passed + 100)
            is_over.set()
        assert short_calls.result().keys() <= {200, 429}
        for sidecar in site.sidecars:
            await site.has_room_for(sidecar, slots - len(before))
        for client in (*before, *local):
            client.leave()
        for sidecar in site.sidecars:
            await site.has_room_for(sidecar, slots)
