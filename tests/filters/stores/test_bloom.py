"""A filter of keys: what it calls absent is absent, as far as was known lately."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from filters.stores import bloom
from filters.stores.bloom import (
    LEAST_KEYS,
    PAUSE_FACTOR,
    PAUSE_S,
    RATE,
    STALE_AFTER,
    Page,
    SureMisses,
)
from sidecar.metrics import Metrics
from tests.support.cached import figure
from tests.support.harness import FakeClock


class There:
    """The keys that are in a cache, read page by page."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.page = 1_000
        self.is_away = False
        self.takes_s = 0.0
        self.read = 0
        """Times that it was begun to be read."""
        self.between: Callable[[], None] = lambda: None
        """Happens between two pages."""
        self.clock = FakeClock()

    async def list_keys(self, cursor: int | None) -> Page | None:
        await asyncio.sleep(0)
        self.read += cursor is None
        start = cursor or 0
        if start:
            self.between()
        if self.is_away:
            return None
        self.clock._monotonic += self.takes_s
        end = start + self.page
        return Page(self.keys[start:end], end if end < len(self.keys) else None)


class Bench:
    def __init__(self) -> None:
        self.there = There()
        self.clock = self.there.clock
        self.metrics = Metrics()
        self.sure = SureMisses(
            self.there.list_keys, self.clock, self.metrics, backend="redis", processes=2
        )

    async def until_read(self, times: int) -> None:
        """Return once the keys were read so often."""
        while self.there.read < times or self.sure._growing is not None:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def made(self) -> None:
        """Return once it was made for the first time."""
        self.sure.is_absent("x")
        await self.until_read(1)

    async def again(self) -> None:
        times = self.there.read + 1
        self.clock.turn(PAUSE_S)
        await self.until_read(times)

    def rate(self) -> float:
        return 2 * figure(self.metrics, "bloom_false_positive_rate", "redis")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.sure.close()


async def test_nothing_is_sure_before_all_keys_were_read(bench: Bench) -> None:
    bench.there.keys = [f"k{number}" for number in range(3_000)]
    seen: list[bool] = []
    bench.there.between = lambda: seen.append(bench.sure.is_absent("other"))
    assert not bench.sure.is_absent("other")
    await bench.until_read(1)
    assert seen == [False, False]
    assert bench.sure.is_absent("other")
    assert not any(bench.sure.is_absent(key) for key in bench.there.keys)


async def test_own_keys_are_known_at_once(bench: Bench) -> None:
    await bench.made()
    assert bench.sure.is_absent("k")
    bench.sure.add("k")
    assert not bench.sure.is_absent("k")


async def test_own_key_that_comes_while_it_is_made_is_not_lost(bench: Bench) -> None:
    bench.there.keys = [f"k{number}" for number in range(2_000)]
    await bench.made()
    bench.there.between = lambda: bench.sure.add("new")
    await bench.again()
    assert not bench.sure.is_absent("new")


async def test_keys_of_others_are_known_after_the_next_making(bench: Bench) -> None:
    await bench.made()
    bench.there.keys = ["theirs"]
    assert bench.sure.is_absent("theirs")
    await bench.again()
    assert not bench.sure.is_absent("theirs")


async def test_keys_that_are_gone_are_forgotten(bench: Bench) -> None:
    bench.there.keys = [f"k{number}" for number in range(1_000)]
    await bench.made()
    bench.there.keys = []
    await bench.again()
    assert bench.sure.is_absent("k7")
    assert bench.rate() == 0.0


async def test_more_keys_than_there_is_room_for_make_it_larger_at_once(bench: Bench) -> None:
    await bench.made()
    for number in range(LEAST_KEYS + 500):
        bench.there.keys.append(f"k{number}")
        bench.sure.add(f"k{number}")
    assert bench.rate() > RATE
    await bench.until_read(3)
    assert bench.rate() < RATE
    absent = [bench.sure.is_absent(f"none{number}") for number in range(5_000)]
    assert absent.count(False) < 5_000 * 2 * RATE
    assert repr(bench.sure).startswith("<SureMisses keys=4")


async def test_estimated_rate_is_about_the_real_one(bench: Bench) -> None:
    bench.there.keys = [f"k{number}" for number in range(LEAST_KEYS - 300)]
    await bench.made()
    absent = [bench.sure.is_absent(f"none{number}") for number in range(20_000)]
    real = absent.count(False) / len(absent)
    assert real / 2 < bench.rate() < real * 2
    assert 0.5 * RATE < bench.rate() < RATE


async def test_nothing_is_sure_when_keys_could_not_be_read_for_long(bench: Bench) -> None:
    await bench.made()
    bench.there.is_away = True
    await bench.again()
    assert bench.sure.is_absent("x")
    bench.clock.turn(STALE_AFTER * PAUSE_S)
    assert not bench.sure.is_absent("x")
    bench.there.is_away = False
    await bench.again()
    assert bench.sure.is_absent("x")


async def test_long_reading_is_done_less_often(bench: Bench) -> None:
    bench.there.takes_s = 1.0
    await bench.made()
    bench.clock.turn(PAUSE_FACTOR - 1.0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert bench.there.read == 1
    assert bench.sure.is_absent("x")
    bench.clock.turn(1.0)
    await bench.until_read(2)


async def test_looks_are_counted_by_what_came_of_them(bench: Bench) -> None:
    bench.there.keys = ["k"]
    await bench.made()
    bench.sure.is_absent("none")
    bench.sure.is_absent("k")
    bench.sure.was_in_vain()
    assert figure(bench.metrics, "bloom", "sure_miss") == 1
    assert figure(bench.metrics, "bloom", "maybe") == 2
    assert figure(bench.metrics, "bloom", "false_positive") == 1


async def test_closed_one_reads_no_more_and_can_still_be_asked() -> None:
    bench = Bench()
    await bench.sure.close()
    assert not bench.sure.is_absent("x")
    bench.sure.add("x")
    await asyncio.sleep(0)
    assert bench.there.read == 0


async def test_missing_package_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rbloom", None)
    with pytest.raises(RuntimeError, match=r"pip install 'llm-sidecar\[bloom\]'"):
        Bench()


def test_smallest_filter_is_small() -> None:
    made = SureMisses(There().list_keys, FakeClock(), Metrics(), backend="disk", processes=1)
    assert made._make(LEAST_KEYS, bloom.RATE).size_in_bits / 8 < 5_500
