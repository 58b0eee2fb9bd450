"""Runs a drill: starts everything, lets it fail by the clock, and gathers the evidence."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import redis

from bench.measure import cpu_ns
from drill.accounts import read_accounts
from drill.callers import Callers
from drill.evidence import Evidence, Figures, Leftovers
from drill.plan import Plan, write_config
from drill.providers import Providers
from sidecar.metrics import merge
from tests.support.process import SidecarProcess, started
from tests.support.valkey import Valkey

REST_S = 10.0
"""After the last call, everything must have been given back within so long."""
LOOK_S = 0.25

LISTENING = "0A"
"""The state of a listener in /proc/net/tcp."""


async def run(plan: Plan, tell: Callable[[str], None]) -> Evidence:
    """A whole drill; nothing it started is left running."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drill-")))
        store = stack.enter_context(Valkey())
        providers = Providers(plan.seed)
        stack.push_async_callback(providers.stop)
        ports = await providers.start()
        sidecars: list[SidecarProcess] = []
        folders = [folder / str(number) for number in range(plan.sidecars)]
        for own in folders:
            own.mkdir()
            running = started("run", "--config", str(write_config(own, plan, ports, store.url)))
            sidecars.append(await stack.enter_async_context(running))
            await sidecars[-1].lines_with(" listens on ")
        admin = await stack.enter_async_context(aiohttp.ClientSession())
        tell(f"{plan.sidecars} sidecars, {plan.rate:g} calls/s for {plan.seconds:g} s")
        watch = Watch(sidecars, providers, store, admin)
        callers = Callers(plan, [_address(each) for each in sidecars])
        cpu = [cpu_ns(each.process.pid) for each in sidecars]
        gc.collect()
        gc.disable()  # a collection here would look like a slow sidecar
        began = monotonic()
        outage: list[float] = []

        async def at(moment_s: float, act: Callable[[], Awaitable[None]]) -> None:
            await asyncio.sleep(began + moment_s - monotonic())
            await act()

        async def fall() -> None:
            tell(f"{monotonic() - began:5.1f} s  a provider goes down")
            outage.append(monotonic())
            await providers.fall()

        async def rise() -> None:
            await providers.rise()
            outage.append(monotonic())
            tell(f"{monotonic() - began:5.1f} s  it is back")

        async def stop_store() -> None:
            tell(f"{monotonic() - began:5.1f} s  the store stops")
            await asyncio.to_thread(store.stop)

        async def start_store() -> None:
            await asyncio.to_thread(store.start)
            tell(f"{monotonic() - began:5.1f} s  the store is back, and has forgotten everything")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(at(plan.store_goes_at, stop_store))
                group.create_task(at(plan.store_goes_at + plan.store_away_s, start_store))
                group.create_task(at(plan.outage_at, fall))
                group.create_task(at(plan.outage_at + plan.outage_s, rise))
                await callers.run()
        finally:
            gc.enable()
        wall_s = monotonic() - began
        cpu_s = [
            (cpu_ns(each.process.pid) - before) / 1e9
            for each, before in zip(sidecars, cpu, strict=True)
        ]
        tell(f"{wall_s:5.1f} s  every call is over")
        leftovers = await watch.at_rest()
        figures = await watch.figures()
        exit_codes = [await each.end() for each in sidecars]
        return Evidence(
            plan=plan,
            calls=callers.calls,
            ledger=providers.ledger,
            accounts=read_accounts(folders),
            figures=figures,
            leftovers=leftovers,
            outage=(outage[0], outage[1]),
            wall_s=wall_s,
            cpu_s=cpu_s,
            exit_codes=exit_codes,
            log=[line for each in sidecars for line in each.log]
            + [{"event": text, "level": "error"} for each in sidecars for text in each.errors],
            stray_bytes=callers.stray_bytes,
        )


class Watch:
    """Looks at what the sidecars hold, from outside."""

    def __init__(
        self,
        sidecars: list[SidecarProcess],
        providers: Providers,
        store: Valkey,
        admin: aiohttp.ClientSession,
    ) -> None:
        self._sidecars = sidecars
        self._providers = providers
        self._store = store
        self._admin = admin

    async def figures(self) -> Figures:
        """The metrics of all sidecars, added up."""
        return Figures(merge([await self._get(each, "/metrics.json") for each in self._sidecars]))

    async def at_rest(self) -> Leftovers:
        """What is held once nothing changes any more, or `REST_S` have passed."""
        give_up_at = monotonic() + REST_S
        while True:
            left = await self._look()
            if left.are_none or monotonic() > give_up_at:
                return left
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> Leftovers:
        figures = await self.figures()
        circuits = [await self._get(each, "/state/circuits") for each in self._sidecars]
        return Leftovers(
            open_calls=figures.total("llm_api_open_calls"),
            in_flight=figures.total("llm_sidecar_queue_in_flight"),
            waiting=figures.total("llm_sidecar_queue_waiting"),
            slots=await asyncio.to_thread(_slots, self._store.port),
            provider_requests=self._providers.open_requests,
            provider_connections=self._providers.open_connections,
            caller_connections=sum(map(_caller_connections, self._sidecars)),
            circuits_not_closed=[
                f"{circuit['upstream']} {circuit['model']} {circuit['state']}"
                for shown in circuits
                for worker in shown["workers"]
                for circuit in worker
                if circuit["state"] != "closed"
            ],
        )

    async def _get(self, sidecar: SidecarProcess, path: str) -> Any:
        async with self._admin.get(sidecar.admin_url + path) as answer:
            answer.raise_for_status()
            return await answer.json()


def _slots(port: int) -> int:
    """Slots held in the store, by all processes."""
    client = redis.Redis(port=port)
    try:
        held: list[Any] = [client.hvals(key) for key in client.keys("*:slots:*")]
        return sum(int(text.partition(b" ")[0]) for each in held for text in each)
    finally:
        client.close()


def _caller_connections(sidecar: SidecarProcess) -> int:
    """Connections to its data port that it has not closed."""
    folder = f"/proc/{sidecar.process.pid}"
    inodes = set()
    for number in os.listdir(f"{folder}/fd"):
        try:
            inodes.add(os.readlink(f"{folder}/fd/{number}").removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue  # it closed while we looked
    port = f":{_address(sidecar)[1]:04X}"
    sockets = [line.split() for line in Path(f"{folder}/net/tcp").read_text().splitlines()[1:]]
    return sum(
        fields[1].endswith(port) and fields[3] != LISTENING and fields[9] in inodes
        for fields in sockets
    )


def _address(sidecar: SidecarProcess) -> tuple[str, int]:
    host, _, port = sidecar.address.rpartition(":")
    return host, int(port)
