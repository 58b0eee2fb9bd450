"""What holds while the shared store is away."""

from __future__ import annotations

import asyncio
import time

import pytest

from filters.request_id import RequestId
from filters.stores.limits import Grant, Limits, Refusal, Rule, Slot, WhenDown, open_limits
from filters.stores.redis import open_redis
from sidecar.api import Rejected, Secret
from sidecar.filter import StoreAddress
from tests.support.harness import Harness, Use
from tests.support.limits import Charge, take
from tests.support.valkey import Valkey

pytestmark = pytest.mark.usefixtures("patience")

MINUTE = Rule("requests_per_minute", 10, 60.0)
WITHIN_S = 0.05
SLACK_S = 0.05
HEALS_WITHIN_S = 5.0


def harness_at(url: str, *, workers: int = 1) -> Harness:
    store = StoreAddress(Secret(url), f"test-{time.monotonic_ns()}")
    return Harness(Use(RequestId), store=store, workers=workers)


def opened(harness: Harness, when_down: WhenDown = "local_share") -> Limits:
    return open_limits(harness.filters[0].kit, when_down)


async def until_up(harness: Harness, is_up: bool = True) -> None:
    redis = open_redis(harness.filters[0].kit)
    async with asyncio.timeout(HEALS_WITHIN_S):
        while redis.is_up is not is_up:  # noqa: ASYNC110 - another process changes
            await asyncio.sleep(0.002)


async def granted(limits: Limits, count: int) -> int:
    return sum([isinstance(await take(limits, [Charge("a", MINUTE)]), Grant) for _ in range(count)])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("when_down", ["open", "closed", "local_share"])
async def test_configured_answer_comes_within_50_ms_when_the_server_hangs(
    own_valkey: Valkey, when_down: WhenDown
) -> None:
    async with harness_at(own_valkey.url) as harness:
        limits = opened(harness, when_down)
        await take(limits, [Charge("a", MINUTE)])
        own_valkey.pause()
        for allowed_s in (WITHIN_S + SLACK_S, 0.005):
            begun = time.perf_counter()
            if when_down == "closed":
                with pytest.raises(Rejected) as refused:
                    await take(limits, [Charge("a", MINUTE)])
                assert (refused.value.status, refused.value.code) == (503, "store_unavailable")
                assert refused.value.retry_after_s == 1.0
            else:
                assert isinstance(await take(limits, [Charge("a", MINUTE)]), Grant)
            assert time.perf_counter() - begun < allowed_s
        labels = {"use": "limits", "answer": when_down}
        assert harness.value("llm_sidecar_store_fallbacks", **labels) == 2
        own_valkey.resume()


async def test_open_grants_everything_while_the_store_is_away(own_valkey: Valkey) -> None:
    own_valkey.stop()
    async with harness_at(own_valkey.url) as harness:
        limits = opened(harness, "open")
        assert await granted(limits, 100) == 100
        grant = await take(limits, [Charge("a", MINUTE, 50)], [Slot("a", 1)])
        assert isinstance(grant, Grant)
        grant.settle(0, 99)
        grant.release()


async def test_local_share_is_the_limit_divided_by_the_replicas_last_seen(
    own_valkey: Valkey,
) -> None:
    async with harness_at(own_valkey.url) as harness:
        open_redis(harness.filters[0].kit)
        await until_up(harness)
        for name in ("second", "third"):
            own_valkey.command("ZADD", f"{harness.store.prefix}:replicas", 9 * 10**15, name)
        redis = open_redis(harness.filters[0].kit)
        redis._beat()
        async with asyncio.timeout(HEALS_WITHIN_S):
            while redis.replicas != 3:  # noqa: ASYNC110 - another process counts
                await asyncio.sleep(0.002)
        await asyncio.to_thread(own_valkey.stop)
        await until_up(harness, False)
        assert await granted(opened(harness), 10) == 3


async def test_local_share_of_a_store_never_seen_is_that_of_the_workers(
    own_valkey: Valkey,
) -> None:
    own_valkey.stop()
    async with harness_at(own_valkey.url, workers=2) as harness:
        assert await granted(opened(harness), 10) == 5


async def test_grant_goes_back_where_it_was_taken_after_the_store_came_back(
    own_valkey: Valkey,
) -> None:
    async with harness_at(own_valkey.url) as harness:
        limits = opened(harness)
        await until_up(harness)
        shared = await take(limits, [], [Slot("a", 1)])
        await asyncio.to_thread(own_valkey.stop)
        await until_up(harness, False)
        local = await take(limits, [], [Slot("a", 1)])
        assert isinstance(shared, Grant)
        assert isinstance(local, Grant)
        await asyncio.to_thread(own_valkey.start)
        await until_up(harness)
        local.release()
        assert isinstance(await take(limits, [], [Slot("a", 1)]), Refusal)
        shared.release()
        assert isinstance(await take(limits, [], [Slot("a", 1)]), Grant)


async def test_store_heals_by_itself(own_valkey: Valkey) -> None:
    async with harness_at(own_valkey.url) as harness:
        limits = opened(harness, "closed")
        assert await granted(limits, 5) == 5
        await asyncio.to_thread(own_valkey.stop)
        await until_up(harness, False)
        with pytest.raises(Rejected):
            await take(limits, [Charge("a", MINUTE)])
        await asyncio.to_thread(own_valkey.start)
        await until_up(harness)
        assert await granted(limits, 20) == 10


async def test_limits_and_their_answer_are_shown(own_valkey: Valkey) -> None:
    async with harness_at(own_valkey.url) as harness:
        shown = repr(opened(harness, "closed"))
        shared = f"<RedisLimits {own_valkey.url} held=0>"
        assert shown == f"<FallbackLimits {shared} when_store_is_down=closed>"
