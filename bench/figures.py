"""The figures: each a function that takes running lanes and puts numbers into the results.

CPU is that of the proxy's processes alone. A run that fails leaves its cell empty and its words in
the notes; the other proxies go on. How figures are shown is left to `report`.
"""

import asyncio
import gc
import os
import resource
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

from bench import measure, wire
from bench.load import (
    LoopResult,
    RunFailed,
    StreamFleet,
    closed_loop,
    leave_midstream,
    open_loop,
)
from bench.proxies import LIMITS, Lane, Proxy, sidecar_command, sidecar_proxy, team_key

JSON_ORDER = b"json %d" % wire.ANSWER_BYTES
DISTURBED_SHARE = 0.03  # of a round's wall time, spent waiting for the core
MAX_REPEATS = 2
COALESCED_SHARE = 0.03  # of the events, above which a remark is made
SETTLE_S = 0.02  # lets the proxy finish what it does after the last byte


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    rounds: int = 5
    calls: int = 6000
    chunk_rounds: int = 3
    chunk_streams: int = 40
    chunk_events: int = 300
    chunk_events_per_s: float = 8000.0
    slow_chunk_rounds: int = 3
    slow_events: int = 40
    idle_streams: int = 2000
    latency_rounds: int = 5
    latency_calls_per_s: float = 1000.0
    latency_s: float = 2.5
    starts: int = 5
    leaves: int = 200
    many_streams: int = 10_000
    many_events: int = 10
    rate_connections: int = 64
    rate_rounds: int = 2
    rate_s: float = 1.5
    body_rounds: int = 2
    scale_calls: int = 3000
    scale_rounds: int = 3
    scale_count: int = 1000
    peer_calls: int = 400  # a round of a gateway that takes milliseconds for one
    sign_rounds: int = 5
    sign_attempts: int = 2000
    repeat_s: float = 60.0  # for rounds that other work of the machine disturbed


QUICK = Plan(
    rounds=2,
    calls=2000,
    chunk_rounds=1,
    chunk_events=150,
    slow_chunk_rounds=1,
    slow_events=25,
    idle_streams=1000,
    latency_rounds=1,
    latency_s=1.5,
    starts=1,
    leaves=40,
    many_streams=2000,
    many_events=5,
    rate_rounds=1,
    rate_s=0.7,
    body_rounds=1,
    scale_calls=1000,
    scale_rounds=1,
    peer_calls=150,
    sign_rounds=2,
    repeat_s=10.0,
)


@dataclass
class Results:
    """Numbers by (proxy, figure), remarks in order, and what a whole run shares."""

    folder: Path
    repeat_s: float  # what is left to take disturbed rounds again
    values: dict[tuple[str, str], float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)  # figures that have no calm round
    _numbers: "count[int]" = field(default_factory=count)

    def put(self, proxy: str, figure: str, value: float) -> None:
        self.values[proxy, figure] = value

    def get(self, proxy: str, figure: str) -> float | None:
        return self.values.get((proxy, figure))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            tell(f"  note: {text}")

    def fresh_lane(self, proxy: Proxy) -> Lane:
        """A lane of its own, not started, for figures that need a young process."""
        return Lane(proxy, self.folder / f"{proxy.name}-{next(self._numbers)}")


def tell(text: str) -> None:
    print(text, flush=True)


Round = tuple[dict[str, float], str]  # what one round of one lane found, and how to say it


@dataclass(frozen=True)
class Taken:
    """A round that was measured."""

    waited: float  # share of its time that the proxy or this process was kept from its core
    values: dict[str, float]

    @property
    def is_disturbed(self) -> bool:
        return self.waited > DISTURBED_SHARE


class Rounds:
    """Runs interleaved rounds and puts the medians into the results.

    A round in which other work of the machine had the core is taken again, twice at most and while
    the run has time for it, and the calmest counts. Disturbed rounds count only where a lane has no
    other, with a remark.
    """

    def __init__(self, name: str, results: Results) -> None:
        self._name = name
        self._results = results
        self._taken: dict[str, list[Taken]] = {}
        self._failed: set[str] = set()

    async def run(
        self, lanes: Sequence[Lane], rounds: int, once: Callable[[Lane], Awaitable[Round]]
    ) -> None:
        """Calls `once(lane)` for each lane in each round; a lane that failed is left out after."""
        for number in range(rounds):
            # Each round starts with another lane, so that none is always the first. Direct stays
            # in front: the others' latency is compared with the direct of their round.
            direct = [lane for lane in lanes if not lane.pid]
            others = [lane for lane in lanes if lane.pid]
            shift = number % len(others) if others else 0
            for lane in [*direct, *others[shift:], *others[:shift]]:
                if lane.name not in self._failed:
                    await self._round(lane, f"{number + 1}/{rounds}", once)
        for name, taken in self._taken.items():
            calm = [one for one in taken if not one.is_disturbed]
            if not calm:
                self._results.disturbed.append(f"{self._name} of {name}")
            for figure in taken[0].values:
                values = [one.values[figure] for one in calm or taken]
                self._results.put(name, figure, statistics.median(values))

    async def _round(
        self, lane: Lane, label: str, once: Callable[[Lane], Awaitable[Round]]
    ) -> None:
        tries: list[Taken] = []
        while True:
            gc.collect()
            threads_before, began = _threads(lane), perf_counter()
            try:
                values, told = await once(lane)
            except RunFailed as error:
                self._failed.add(lane.name)
                self._results.note(f"{self._name}, {lane.proxy.title}: {error}")
                return
            wall_s = perf_counter() - began
            waited_ns = sum(map(measure.kept_waiting_ns, threads_before, _threads(lane)))
            taken = Taken(waited_ns / 1e9 / wall_s, values)
            tries.append(taken)
            mark = f"  (waited {taken.waited:.0%} for the core)" if taken.is_disturbed else ""
            tell(f"  {self._name} {label}  {lane.name:16} {told}{mark}")
            if not taken.is_disturbed or len(tries) > MAX_REPEATS:
                break
            if self._results.repeat_s < wall_s:
                break
            self._results.repeat_s -= wall_s
        calmest = min(tries, key=lambda one: one.waited)
        self._taken.setdefault(lane.name, []).append(calmest)


def _threads(lane: Lane) -> tuple[measure.Threads, measure.Threads]:
    """The proxy's, and those of this process."""
    proxy = measure.process_tree(lane.pid) if lane.pid else []
    return measure.threads(proxy), measure.threads([os.getpid()])


def cpu_us(lane: Lane) -> float:
    """What the lane's proxy has used, in microseconds; 0 for direct."""
    return measure.cpu_ns(lane.pid) / 1000 if lane.pid else 0.0


def _proxied(lanes: Sequence[Lane]) -> list[Lane]:
    """All but direct, which has no process to measure."""
    return [lane for lane in lanes if lane.pid]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _check_calls(lane: Lane, result: LoopResult, upstream_calls: int) -> None:
    if result.failed:
        raise RunFailed(f"{result.failed} of {result.calls} replies were not a 200")
    if upstream_calls < result.calls:
        raise RunFailed(f"only {upstream_calls} of {result.calls} calls reached the upstream")


async def _counted_loop(
    lane: Lane, requests: wire.RequestMaker, connections: int, calls: int
) -> float:
    """CPU microseconds of a closed loop of calls, each of which must have reached the upstream."""
    calls_before, cpu_before = lane.upstream.calls, cpu_us(lane)
    result = await closed_loop(lane.address, requests, connections=connections, calls=calls)
    await asyncio.sleep(SETTLE_S)
    used = cpu_us(lane) - cpu_before
    _check_calls(lane, result, lane.upstream.calls - calls_before)
    return used


# 1. A call


async def calls(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU per call: 1 KB POST, 600 B JSON answer, keep-alive, closed loop of 16 connections."""
    requests = wire.RequestMaker(JSON_ORDER, is_stream=False)
    for lane in lanes:  # warm caches, pools and branch predictors
        await closed_loop(lane.address, requests, connections=16, calls=plan.calls // 4)

    async def once(lane: Lane) -> Round:
        used = await _counted_loop(lane, requests, 16, plan.calls)
        return {"call_us": used / plan.calls}, f"{used / plan.calls:.1f} us a call"

    await Rounds("calls", results).run(_proxied(lanes), plan.rounds, once)


# 2. A chunk


async def chunks(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU per SSE event that arrives alone, on a busy proxy."""
    await _chunks(
        lanes, plan, results, "chunk", plan.chunk_events, plan.chunk_events_per_s, plan.chunk_rounds
    )


async def slow_chunks(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """The same at 1,000 events per second, where the proxy sleeps before each."""
    await _chunks(
        lanes, plan, results, "slow_chunk", plan.slow_events, 1000.0, plan.slow_chunk_rounds
    )


async def _chunks(
    lanes: Sequence[Lane],
    plan: Plan,
    results: Results,
    figure: str,
    events_each: int,
    events_per_s: float,
    number_of_rounds: int,
) -> None:
    """Measures the window after all first events and before the ends, so no call is in it."""
    total = plan.chunk_streams * events_each

    async def once(lane: Lane) -> Round:
        async with _fleet(lane, plan.chunk_streams) as fleet:
            await asyncio.sleep(SETTLE_S)
            cpu_before, reads_before = cpu_us(lane), fleet.reads
            if not await fleet.send_paced(events_each, events_per_s):
                raise RunFailed("events were lost")
            await asyncio.sleep(SETTLE_S)
            used, reads = cpu_us(lane) - cpu_before, fleet.reads - reads_before
            await fleet.finish()
        values = {f"{figure}_us": used / total, f"reads_per_{figure}": reads / total}
        return values, f"{used / total:.1f} us a chunk, {reads / total:.3f} client reads a chunk"

    await Rounds(f"{figure}s", results).run(_proxied(lanes), number_of_rounds, once)
    for lane in _proxied(lanes):
        reads = results.get(lane.name, f"reads_per_{figure}")
        if reads is not None and abs(reads - 1) > COALESCED_SHARE:
            results.note(
                f"{figure}s: {lane.proxy.title} made {reads:.2f} reads of an event, so its "
                "figure is not the cost of one event"
            )


@asynccontextmanager
async def _fleet(lane: Lane, size: int) -> AsyncIterator[StreamFleet]:
    fleet = StreamFleet(lane.address, lane.upstream, size)
    try:
        await fleet.open()
        yield fleet
    finally:
        await fleet.close()


# 3. An open, silent stream


async def memory(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """Memory per open stream that delivered one event; in a young process, kernel not counted."""

    async def once(old: Lane) -> Round:
        lane = results.fresh_lane(old.proxy)
        await lane.start()
        try:
            requests = wire.RequestMaker(JSON_ORDER, is_stream=False)
            await closed_loop(lane.address, requests, connections=16, calls=200)
            async with _fleet(lane, 20) as warm:
                await warm.finish()
            await asyncio.sleep(0.3)
            before = measure.memory_bytes(lane.pid, "Pss")
            async with _fleet(lane, plan.idle_streams):
                await asyncio.sleep(0.3)
                grown = measure.memory_bytes(lane.pid, "Pss") - before
        finally:
            await lane.stop()
        each = grown / plan.idle_streams
        return {"stream_bytes": each}, f"{each / 1000:.1f} kB an open stream"

    await Rounds("memory", results).run(_proxied(lanes), 1, once)


# 4. Latency


async def latency(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """Added time to first byte at a steady rate, counted from the scheduled moment."""
    direct = next((lane for lane in lanes if lane.name == "direct"), None)
    requests = wire.RequestMaker(JSON_ORDER, is_stream=False)
    direct_ms = (0.0, 0.0)

    async def once(lane: Lane) -> Round:
        nonlocal direct_ms
        calls_before, cpu_before = lane.upstream.calls, cpu_us(lane)
        result = await open_loop(
            lane.address, requests, calls_per_s=plan.latency_calls_per_s, seconds=plan.latency_s
        )
        _check_calls(lane, result, lane.upstream.calls - calls_before)
        await asyncio.sleep(SETTLE_S)
        used = (cpu_us(lane) - cpu_before) / result.calls
        p50, p99 = (percentile(result.first_byte_s, share) * 1000 for share in (0.5, 0.99))
        told = f"p50 {p50:.3f} ms, p99 {p99:.3f} ms, {used:.1f} us CPU a call"
        if lane is direct:
            direct_ms = (p50, p99)
            return {"p50_ms": p50, "p99_ms": p99}, told
        added = {"p50_ms": p50 - direct_ms[0], "p99_ms": p99 - direct_ms[1]}
        return {**added, "slow_call_us": used}, told

    await Rounds("latency", results).run(lanes, plan.latency_rounds, once)
    if direct is None:
        results.note("latency is not 'added': direct was not measured")


# 5. Start


async def start(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """From the start of the process to its first 200, and the memory it then rests at."""

    async def once(old: Lane) -> Round:
        lane = results.fresh_lane(old.proxy)
        await lane.start()
        try:
            await asyncio.sleep(0.2)
            rss = measure.memory_bytes(lane.pid, "Rss")
        finally:
            await lane.stop()
        values = {"ready_ms": lane.ready_s * 1000, "idle_rss_bytes": float(rss)}
        return values, f"ready in {lane.ready_s * 1000:.0f} ms, idle RSS {rss / 1e6:.0f} MB"

    await Rounds("start", results).run(_proxied(lanes), plan.starts, once)


# 6. A client leaves


async def leave(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """From a client's close in mid-stream to the end of its upstream's connection."""

    async def once(lane: Lane) -> Round:
        delays = await leave_midstream(lane.address, lane.upstream, times=plan.leaves)
        p50, p99 = (percentile(delays, share) * 1000 for share in (0.5, 0.99))
        worst = max(delays) * 1000
        values = {"leave_p50_ms": p50, "leave_p99_ms": p99, "leave_max_ms": worst}
        return values, f"p50 {p50:.3f} ms, p99 {p99:.3f} ms, max {worst:.3f} ms"

    await Rounds("leave", results).run(_proxied(lanes), 1, once)


# 7. Many streams


def streams_possible(wanted: int) -> int:
    """A proxy needs two descriptors a stream; so does this process, which plays both ends."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    return min(wanted, (limit - in_use - 100) // 2)


async def streams(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """Many streams open at once, then events as fast as they go, then the end: nothing is lost."""
    size = streams_possible(plan.many_streams)
    if size < plan.many_streams:
        results.note(
            f"streams: {size:,} at once instead of {plan.many_streams:,}: a proxy needs two open "
            "files for each, and this machine allows no process more than "
            f"{resource.getrlimit(resource.RLIMIT_NOFILE)[1]:,}"
        )

    async def once(old: Lane) -> Round:
        lane = results.fresh_lane(old.proxy)  # whose stop frees all the connections it pooled
        await lane.start()
        try:
            return await _many_streams(lane, size, plan.many_events)
        finally:
            await lane.stop()

    await Rounds("streams", results).run(lanes, 1, once)


async def _many_streams(lane: Lane, size: int, events: int) -> Round:
    cpu_before, began = cpu_us(lane), perf_counter()
    async with _fleet(lane, size) as fleet:
        opened_s = perf_counter() - began
        await fleet.send_at_full_speed(events)
        await fleet.finish()
        wall_s, used_s = perf_counter() - began, (cpu_us(lane) - cpu_before) / 1e6
        tail = len(wire.LAST_EVENTS) + len(wire.DONE_EVENT)
        expected = size * ((events + 1) * wire.EVENT_BYTES + tail)
        lost = expected - fleet.received_bytes
        complete = fleet.complete
    values = {
        "streams_open": float(size),
        "streams_complete": float(complete),
        "streams_lost_bytes": float(lost),
        "streams_wall_s": wall_s,
        "streams_cpu_s": used_s,
    }
    return values, (
        f"{complete} of {size} complete, {lost} bytes lost, opened in {opened_s:.1f} s, "
        f"{wall_s:.1f} s in all, {used_s:.1f} s CPU"
    )


# 8. Size

BODY_SIZES = ((64 * 1024, 200, 4), (1024 * 1024, 30, 4), (8 * 1024 * 1024, 6, 2))


async def bodies(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU per KB of large answers and large requests."""
    for size, number, connections in BODY_SIZES:
        order = b"json %d" % size
        answers = wire.RequestMaker(order, is_stream=False)
        requests = wire.RequestMaker(JSON_ORDER, is_stream=False, body_bytes=size)
        for way, maker in (("answer", answers), ("request", requests)):
            figure = f"{way}_{size // 1024}_kb"
            once = partial(_one_body, figure, maker, connections, number, size)
            await Rounds(f"bodies {figure}", results).run(_proxied(lanes), plan.body_rounds, once)


async def _one_body(
    figure: str, maker: wire.RequestMaker, connections: int, number: int, size: int, lane: Lane
) -> Round:
    used = await _counted_loop(lane, maker, connections, number)
    each = used / number / (size / 1024)
    return {figure: each}, f"{each:.3f} us a KB"


async def scale(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU per call of a sidecar with one model or team and with many."""
    if not any(lane.name == "sidecar-default" for lane in lanes):
        return
    variants = []
    for name, models, teams in (
        ("1 model, no team", 1, 0),
        (f"{plan.scale_count} models, no team", plan.scale_count, 0),
        ("1 model, 1 team", 1, 1),
        (f"1 model, {plan.scale_count} teams", 1, plan.scale_count),
    ):
        command = sidecar_command(models=models, teams=teams)
        lane = results.fresh_lane(sidecar_proxy(f"scale-{models}-{teams}", name, command))
        try:
            await lane.start()
        except RunFailed as error:
            results.note(f"scale, {name}: {error}")
        else:
            variants.append(lane)
    requests = wire.RequestMaker(JSON_ORDER, is_stream=False, key=team_key(0))

    async def once(lane: Lane) -> Round:
        used = await _counted_loop(lane, requests, 16, plan.scale_calls)
        return {
            "scale_call_us": used / plan.scale_calls
        }, f"{used / plan.scale_calls:.1f} us a call"

    try:
        for lane in variants:
            await closed_loop(lane.address, requests, connections=16, calls=500)
        await Rounds("scale", results).run(variants, plan.scale_rounds, once)
    finally:
        for lane in variants:
            await lane.stop()


async def limits(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """CPU per call with and without the filters of resilience and limits, memory store."""
    if not any(lane.name == "sidecar-default" for lane in lanes):
        return
    variants = [results.fresh_lane(proxy) for proxy in LIMITS]
    requests = wire.RequestMaker(JSON_ORDER, is_stream=False)

    async def once(lane: Lane) -> Round:
        used = await _counted_loop(lane, requests, 16, plan.calls)
        each = used / plan.calls
        return {"limits_call_us": each}, f"{each:.1f} us a call"

    try:
        for lane in variants:
            await lane.start()
            await closed_loop(lane.address, requests, connections=16, calls=plan.calls // 4)
        await Rounds("limits", results).run(variants, plan.rounds, once)
    except RunFailed as error:
        results.note(f"limits: {error}")
    finally:
        for lane in variants:
            await lane.stop()
    without = results.get(LIMITS[0].name, "limits_call_us")
    for proxy in LIMITS[1:]:
        with_them = results.get(proxy.name, "limits_call_us")
        if without is not None and with_them is not None:
            results.put(proxy.name, "limits_added_us", with_them - without)


# 9. Rate


async def rate(lanes: Sequence[Lane], plan: Plan, results: Results) -> None:
    """Calls per second of one proxy core, and how busy the proxy was meanwhile."""
    requests = wire.RequestMaker(JSON_ORDER, is_stream=False)

    async def once(lane: Lane) -> Round:
        calls_before, cpu_before = lane.upstream.calls, cpu_us(lane)
        result = await closed_loop(
            lane.address, requests, connections=plan.rate_connections, seconds=plan.rate_s
        )
        _check_calls(lane, result, lane.upstream.calls - calls_before)
        busy = min(1.0, (cpu_us(lane) - cpu_before) / 1e6 / result.wall_s)
        per_s = result.calls / result.wall_s
        values = {"calls_per_s": per_s, "busy": busy}
        return values, f"{per_s:,.0f} calls/s, proxy core {busy:.0%} busy"

    await Rounds("rate", results).run(lanes, plan.rate_rounds, once)
