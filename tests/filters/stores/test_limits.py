"""Which limits a configuration opens."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from filters.request_id import RequestId
from filters.stores.limits import Grant, Limits, Rule, open_limits
from filters.stores.memory_limits import MemoryLimits
from filters.stores.redis import open_redis
from sidecar.api import Secret
from sidecar.filter import StoreAddress
from tests.support.harness import Harness, Use
from tests.support.limits import Charge, take
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")

MINUTE = Rule("requests_per_minute", 10, 60.0)
HEALS_WITHIN_S = 5.0


def opened(harness: Harness, number: int = 0) -> Limits:
    return open_limits(harness.filters[number].kit, "local_share")


async def until_up(harness: Harness) -> None:
    redis = open_redis(harness.filters[0].kit)
    async with asyncio.timeout(HEALS_WITHIN_S):
        while not redis.is_up:  # noqa: ASYNC110 - another process changes
            await asyncio.sleep(0.002)


async def granted(limits: Limits, count: int) -> int:
    return sum([isinstance(await take(limits, [Charge("a", MINUTE)]), Grant) for _ in range(count)])


async def test_memory_is_the_same_for_all_filters() -> None:
    async with Harness(Use(RequestId), Use(RequestId)) as harness:
        first, second = opened(harness), opened(harness, number=1)
        assert isinstance(first, MemoryLimits)
        assert await granted(first, 7) == 7
        assert await granted(second, 7) == 3


async def test_workers_without_a_store_divide_the_limit() -> None:
    async with Harness(Use(RequestId), workers=4) as harness:
        assert await granted(opened(harness), 10) == 2


async def test_store_is_the_same_for_all_processes(valkey: Valkey) -> None:
    store = StoreAddress(Secret(valkey.url), f"test-{time.monotonic_ns()}")
    async with (
        Harness(Use(RequestId), store=store) as one,
        Harness(Use(RequestId), store=store) as other,
    ):
        await until_up(one)
        await until_up(other)
        assert await granted(opened(one), 7) == 7
        assert await granted(opened(other), 7) == 3
        assert one.value("llm_sidecar_store_up") == 1


async def test_grants_outlive_a_reload(valkey: Valkey) -> None:
    store = StoreAddress(Secret(valkey.url), f"test-{time.monotonic_ns()}")
    async with Harness(Use(RequestId), store=store) as harness:
        old = opened(harness)
        await until_up(harness)
        grant = await take(old, [Charge("a", MINUTE, 10)])
        assert isinstance(grant, Grant)
        assert await granted(opened(harness), 1) == 0
        grant.settle(0, 4)
        assert await granted(opened(harness), 10) == 6


def test_one_process_alone_loads_nothing_of_the_shared_store() -> None:
    program = (
        "import sys, filters.stores.limits;"
        "sys.exit(any(n.split('.')[0] == 'redis' or n == 'filters.stores.redis'"
        " for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
