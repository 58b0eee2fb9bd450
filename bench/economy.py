"""What a cache hit saves beside a pass-through and other gateways' hits, and what accounting costs.

Both figures are CPU of a busy proxy, as `calls` is. Every reply is looked at and the upstream's
calls are counted: a round whose hits were not all hits, or whose misses were not, gives no figure.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from bench import peers, wire
from bench.figures import JSON_ORDER, Plan, Results, Round, Rounds, cpu_us, tell
from bench.load import RunFailed, closed_loop
from bench.proxies import Lane, Missing, Proxy, default_chain, sidecar_command, sidecar_proxy
from tests.support.valkey import Valkey

CONNECTIONS = 16
HIT_BODIES = 100
"""Different questions that come again and again; LiteLLM's cache in memory holds 200 answers."""
TIGHT_BYTES = 256 * 1024
"""A cache on disk holds an eighth of its bytes in memory as well: not these questions, in turn."""
SETTLE_S = 0.25
"""After a round: accounting is written beside the calls, and is part of their cost."""

# What clients send. All bodies have the same size.

_deterministic = partial(
    wire.RequestMaker, JSON_ORDER, is_stream=False, members=b'"temperature":0,'
)


def _again(headers: bytes) -> wire.RequestMaker:
    return _deterministic(distinct=HIT_BODIES, headers=headers)


def _new(headers: bytes) -> wire.RequestMaker:
    return _deterministic(headers=headers)


def _no_store(headers: bytes) -> wire.RequestMaker:
    return _deterministic(headers=headers + b"cache-control: no-store\r\n")


def _creative(headers: bytes) -> wire.RequestMaker:
    """What most calls are: no temperature is given, so the answer is another each time."""
    return wire.RequestMaker(JSON_ORDER, is_stream=False, headers=headers)


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is, and how every reply must say where it comes from."""

    title: str
    proof: tuple[bytes, bytes | None] | None = None  # a header and its value; None: any value
    asks_upstream: bool = True  # the bench's own, with each call; False: never
    against: str = ""  # the row whose CPU is taken off to get what was added

    @property
    def said(self) -> str:
        """What every reply said; empty where there is nothing to say."""
        name, value = self.proof or (b"", None)
        return (name + b": " + value if value else name).decode()


_HIT = (b"x-sidecar-cache", b"hit")
_MISS = (b"x-sidecar-cache", b"miss")
_BYPASS = (b"x-sidecar-cache", b"bypass")

CACHE_ROWS = {
    "cache-none": Row("sidecar, default chain without `cache`"),
    "cache-mock": Row("the same, to the embedded mock in its process", asks_upstream=False),
    "cache-bypass": Row("sidecar, `cache-control: no-store`", _BYPASS),
    "cache-miss": Row("sidecar, miss", _MISS),
    "cache-miss-disk": Row("sidecar, miss, written to disk", _MISS),
    "cache-hit": Row("sidecar, hit in memory", _HIT, asks_upstream=False),
    "cache-hit-front": Row(
        "sidecar, hit on disk, held in memory as well", _HIT, asks_upstream=False
    ),
    "cache-hit-disk": Row("sidecar, hit on disk, read from the file", _HIT, asks_upstream=False),
    "cache-hit-redis": Row("sidecar, hit in Valkey", _HIT, asks_upstream=False),
    "litellm": Row("LiteLLM, no cache"),
    "litellm-hit": Row(
        "LiteLLM, hit in memory", (b"x-litellm-cache-key", None), asks_upstream=False
    ),
    "portkey": Row("Portkey (which has no cache)"),
}
CACHE_RATIOS = {
    "hit_against_mock": "cache-mock",
    "hit_against_litellm": "litellm-hit",
}
"""Calls/s per core of a hit in memory, in those of another row."""

ECONOMY_ROWS = {
    "economy-none": Row("without the filters of this table"),
    "economy-counter": Row("`token_counter`", against="economy-none"),
    "economy-ledger": Row("and `ledger`, on disk", against="economy-counter"),
    "economy-cost": Row("and `cost`", against="economy-counter"),
    "economy-budget": Row(
        "and `cost`, `budget` with limits in money and in tokens", against="economy-cost"
    ),
    "economy-bypass": Row(
        "and `cache`, calls it passes by (no temperature)", _BYPASS, against="economy-counter"
    ),
    "economy-miss": Row("and `cache`, misses, stored in memory", _MISS, against="economy-counter"),
    "economy-hit": Row("and `cache`, hits", _HIT, asks_upstream=False, against="economy-counter"),
    "economy-default": Row("default chain, no budget set", _BYPASS, against="economy-none"),
    "economy-all": Row("default chain, budgets set", _BYPASS, against="economy-none"),
}

# The proxies. State is kept on disk, as with the shipped config.yaml.

ECONOMY_FILTERS = ("ledger", "cost", "budget", "token_counter", "cache")
_PRICES = "cost: {prices: {bench-gpt: {input: 0.15, output: 0.6}}}"
_BUDGETS = "budget: {usd_per_day: 1000000, tokens_per_day: 1000000000}"


def _with_only(*names: str) -> str:
    """The built-in default chain with no other filters of economy than these.

    `token_budget` is not in it either: with no limit set it does nothing, but reads usage.
    """
    return default_chain(without={*ECONOMY_FILTERS, "token_budget"} - {*names})


def _sidecar(
    rows: dict[str, Row],
    name: str,
    *,
    chains: str | None = None,
    settings: Sequence[str] = (),
    store: str | None = None,
    is_mocked: bool = False,
) -> Proxy:
    filters = f"{{{', '.join(settings)}}}" if settings else None
    command = sidecar_command(
        chains=chains, filters=filters, store=store, keeps_state=True, is_mocked=is_mocked
    )
    return sidecar_proxy(name, rows[name].title, command)


@dataclass(frozen=True)
class Case:
    """A proxy to start, what to send it, and how often."""

    proxy: Proxy
    requests: Callable[[bytes], wire.RequestMaker]
    calls: int


def _cache_cases(store: str, plan: Plan) -> list[Case]:
    sidecar = partial(_sidecar, CACHE_ROWS)
    without = default_chain(without=["cache"])
    memory = [_PRICES]
    front = [_PRICES, "cache: {backend: disk}"]
    disk = [_PRICES, f"cache: {{backend: disk, max_bytes: {TIGHT_BYTES}, max_entry_bytes: 65536}}"]
    # The ledger stays where it is: nothing but the cache differs.
    redis = [_PRICES, "cache: {backend: redis}", "ledger: {where: disk}"]
    ours = [
        (sidecar("cache-none", settings=memory, chains=without), _new),
        (sidecar("cache-mock", settings=memory, chains=without, is_mocked=True), _new),
        (sidecar("cache-bypass", settings=memory), _no_store),
        (sidecar("cache-miss", settings=memory), _new),
        (sidecar("cache-miss-disk", settings=front), _new),
        (sidecar("cache-hit", settings=memory), _again),
        (sidecar("cache-hit-front", settings=front), _again),
        (sidecar("cache-hit-disk", settings=disk), _again),
        (sidecar("cache-hit-redis", settings=redis, store=store), _again),
    ]
    litellm = partial(peers.litellm_proxy, "litellm", CACHE_ROWS["litellm"].title)
    litellm_hit = partial(peers.litellm_proxy, "litellm-hit", CACHE_ROWS["litellm-hit"].title)
    others = [
        (litellm(has_cache=False), _new),
        (litellm_hit(has_cache=True), _again),
        (peers.portkey_proxy("portkey", CACHE_ROWS["portkey"].title), _new),
    ]
    return [
        *(Case(proxy, requests, plan.calls) for proxy, requests in ours),
        *(Case(proxy, requests, plan.peer_calls) for proxy, requests in others),
    ]


def _economy_cases(plan: Plan) -> list[Case]:
    sidecar = partial(_sidecar, ECONOMY_ROWS)
    counter = _with_only("token_counter")
    ledger = _with_only("token_counter", "ledger")
    cost = _with_only("token_counter", "cost")
    budget = _with_only("token_counter", "cost", "budget")
    cache = _with_only("token_counter", "cache")
    budgets = [_PRICES, _BUDGETS]
    made = [
        (sidecar("economy-none", chains=_with_only()), _creative),
        (sidecar("economy-counter", chains=counter), _creative),
        (sidecar("economy-ledger", chains=ledger), _creative),
        (sidecar("economy-cost", chains=cost, settings=[_PRICES]), _creative),
        (sidecar("economy-budget", chains=budget, settings=budgets), _creative),
        (sidecar("economy-bypass", chains=cache), _creative),
        (sidecar("economy-miss", chains=cache), _new),
        (sidecar("economy-hit", chains=cache), _again),
        (sidecar("economy-default", settings=[_PRICES]), _creative),
        (sidecar("economy-all", settings=budgets), _creative),
    ]
    return [Case(proxy, requests, plan.calls) for proxy, requests in made]


# The figures


async def cache(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """Calls/s per core of pass-throughs, misses and hits, and of other gateways'."""
    if not any(lane.name == "sidecar-default" for lane in lanes):
        return
    with Valkey() as store:  # on the bench's core: its CPU is not the proxy's
        await _measure("cache", CACHE_ROWS, _cache_cases(store.url, plan), plan, results)
    hit = results.get("cache-hit", "cache_per_core")
    for figure, name in CACHE_RATIOS.items():
        other = results.get(name, "cache_per_core")
        if hit is not None and other is not None:
            results.put("cache-hit", figure, hit / other)


async def economy(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU per call of the default chain without the filters of economy, and with each of them."""
    if not any(lane.name == "sidecar-default" for lane in lanes):
        return
    await _measure("economy", ECONOMY_ROWS, _economy_cases(plan), plan, results)
    for name, row in ECONOMY_ROWS.items():
        own, base = (results.get(each, "economy_us") for each in (name, row.against))
        if own is not None and base is not None:
            results.put(name, "economy_added_us", own - base)


async def _measure(
    figure: str, rows: dict[str, Row], cases: Sequence[Case], plan: Plan, results: Results
) -> None:
    lanes: list[Lane] = []
    running: dict[str, tuple[Case, wire.RequestMaker]] = {}

    async def once(lane: Lane) -> Round:
        case, maker = running[lane.name]
        return await _one_round(figure, rows[lane.name], lane, maker, case.calls)

    try:
        for case in cases:
            lane = results.fresh_lane(case.proxy)
            try:
                found = case.proxy.prepare()
                await lane.start()
                lanes.append(lane)
                maker = case.requests(case.proxy.headers(lane.upstream.port))
                warm_up = max(case.calls // 4, HIT_BODIES)
                await closed_loop(lane.address, maker, connections=CONNECTIONS, calls=warm_up)
            except (Missing, RunFailed) as error:
                results.note(f"no figures for {case.proxy.title}: {error}")
                continue
            tell(f"  started {case.proxy.title} ({found})")
            running[lane.name] = case, maker
        await asyncio.sleep(SETTLE_S)
        able = [lane for lane in lanes if lane.name in running]
        await Rounds(figure, results).run(able, plan.rounds, once)
    finally:
        for lane in lanes:
            await lane.stop()


async def _one_round(
    figure: str, row: Row, lane: Lane, maker: wire.RequestMaker, calls: int
) -> Round:
    proven = 0

    def look(reply: wire.MessageReader) -> None:
        nonlocal proven
        assert row.proof is not None
        name, expected = row.proof
        value = reply.header(name)
        proven += bool(value) if expected is None else value == expected

    upstream_before, cpu_before, began = lane.upstream.calls, cpu_us(lane), perf_counter()
    result = await closed_loop(
        lane.address,
        maker,
        connections=CONNECTIONS,
        calls=calls,
        look=look if row.proof else None,
    )
    busy = (cpu_us(lane) - cpu_before) / 1e6 / (perf_counter() - began)
    await asyncio.sleep(SETTLE_S)
    each = (cpu_us(lane) - cpu_before) / calls
    asked = lane.upstream.calls - upstream_before
    if result.failed:
        raise RunFailed(f"{result.failed} of {calls} replies were not a 200")
    if asked != (calls if row.asks_upstream else 0):
        raise RunFailed(f"{asked} of {calls} calls reached the upstream")
    if row.proof and proven != calls:
        raise RunFailed(f"only {proven} of {calls} replies said {row.said}")
    values = {
        f"{figure}_us": each,
        f"{figure}_per_core": 1e6 / each,
        f"{figure}_per_s": calls / result.wall_s,
        f"{figure}_busy": min(1.0, busy),
        f"{figure}_calls": float(calls),
        f"{figure}_asked": float(asked),
    }
    return values, f"{each:.1f} us a call, {asked} of {calls} asked upstream"
