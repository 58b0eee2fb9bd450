"""A token is fetched once, kept, renewed before it expires; nobody waits while it is good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from unittest import mock

import pytest

from filters.stores.tokens import LONGEST_WAIT_S, NEW_S, NoToken, Token, TokenStore
from sidecar.clock import SystemClock
from tests.support.harness import FakeClock

LIFE_S = 3600.0
REFRESH_S = 3000.0


class Provider:
    """Gives numbered tokens, or fails, or keeps everybody waiting until `answer` is set."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.count = 0
        self.error: Exception | None = None
        self.answer = asyncio.Event()
        self.answer.set()
        self.store = TokenStore(self.clock)

    async def fetch(self) -> Token:
        self.count += 1
        number = self.count
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        now = self.clock.monotonic()
        return Token(f"token-{number}", now + REFRESH_S, now + LIFE_S)

    async def get(self) -> Token:
        return await self.store.get(self.fetch)

    def current(self) -> Token | None:
        return self.store.current(self.fetch)

    async def settled(self) -> None:
        """Return once no fetch is running."""
        while self.store._running is not None:
            await asyncio.wait((self.store._running,))


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    provider = Provider()
    yield provider
    await provider.store.close()


async def test_first_who_asks_waits_for_the_fetch_and_the_others_do_not(provider: Provider) -> None:
    assert provider.current() is None
    assert (await provider.get()).value == "token-1"
    assert (await provider.get()).value == "token-1"
    assert provider.count == 1


async def test_many_who_ask_at_once_share_one_fetch(provider: Provider) -> None:
    provider.answer.clear()
    asking = [asyncio.ensure_future(provider.get()) for _ in range(50)]
    await asyncio.sleep(0)
    provider.answer.set()
    assert {token.value for token in await asyncio.gather(*asking)} == {"token-1"}
    assert provider.count == 1


async def test_one_who_leaves_does_not_end_the_fetch_of_the_others(provider: Provider) -> None:
    provider.answer.clear()
    first, second = (asyncio.ensure_future(provider.get()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    provider.answer.set()
    assert (await second).value == "token-1"
    assert first.cancelled()
    assert provider.count == 1


async def test_renewal_runs_beside_the_calls_before_the_token_expires(provider: Provider) -> None:
    await provider.get()
    provider.clock.turn(REFRESH_S)
    provider.answer.clear()
    for _ in range(5):
        assert (await provider.get()).value == "token-1"
    provider.answer.set()
    await provider.settled()
    assert (await provider.get()).value == "token-2"
    assert provider.count == 2


async def test_failed_renewal_keeps_the_token_while_it_is_good(provider: Provider) -> None:
    await provider.get()
    provider.clock.turn(REFRESH_S)
    provider.error = NoToken("away")
    assert (await provider.get()).value == "token-1"
    await provider.settled()
    assert (await provider.get()).value == "token-1"
    provider.clock.turn(LIFE_S - REFRESH_S)
    with pytest.raises(NoToken, match="away"):
        await provider.get()


async def test_renewal_that_failed_is_tried_again_with_growing_pauses(provider: Provider) -> None:
    await provider.get()
    provider.clock.turn(REFRESH_S)
    provider.error = NoToken("away")
    pauses = []
    for _ in range(9):
        before = provider.count
        waited = 0.0
        while provider.count == before:
            await provider.get()
            await provider.settled()
            if provider.count == before:
                provider.clock.turn(0.5)
                waited += 0.5
        pauses.append(waited)
    assert pauses[:4] == [0.0, 1.0, 2.0, 4.0]
    assert max(pauses) == LONGEST_WAIT_S


async def test_without_a_token_a_failure_is_told_at_once_until_the_pause_is_over(
    provider: Provider,
) -> None:
    provider.error = NoToken("away")
    for _ in range(3):
        with pytest.raises(NoToken, match="away"):
            await provider.get()
    assert provider.count == 1
    provider.error = None
    provider.clock.turn(1.0)
    assert (await provider.get()).value == "token-2"


async def test_expired_token_is_never_used(provider: Provider) -> None:
    await provider.get()
    provider.clock.turn(LIFE_S)
    assert provider.current() is None
    assert (await provider.get()).value == "token-2"


async def test_token_that_the_provider_refuses_later_is_fetched_anew(provider: Provider) -> None:
    token = await provider.get()
    provider.clock.turn(NEW_S)
    assert not provider.store.refused(token)
    assert (await provider.get()).value == "token-2"


async def test_fresh_token_that_is_refused_blames_the_credentials_and_is_kept(
    provider: Provider,
) -> None:
    token = await provider.get()
    assert provider.store.refused(token)
    assert await provider.get() is token
    assert provider.count == 1


async def test_who_asks_after_a_refusal_waits_for_the_new_token(provider: Provider) -> None:
    token = await provider.get()
    provider.clock.turn(NEW_S)
    provider.answer.clear()
    assert not provider.store.refused(token)
    asking = asyncio.ensure_future(provider.get())
    await asyncio.sleep(0)
    assert not asking.done()
    provider.answer.set()
    assert (await asking).value == "token-2"


async def test_refused_token_is_used_on_when_there_is_no_new_one(provider: Provider) -> None:
    token = await provider.get()
    provider.clock.turn(NEW_S)
    provider.error = NoToken("away")
    provider.store.refused(token)
    for _ in range(3):
        assert await provider.get() is token
    assert provider.count == 2


async def test_late_refusal_of_an_old_token_does_not_touch_the_new_one(provider: Provider) -> None:
    old = await provider.get()
    provider.clock.turn(NEW_S)
    provider.store.refused(old)
    new = await provider.get()
    assert not provider.store.refused(old)
    assert provider.current() is new
    assert provider.count == 2


async def test_closing_ends_a_fetch_and_who_waits_for_it_is_told(provider: Provider) -> None:
    provider.answer.clear()
    asking = asyncio.ensure_future(provider.get())
    await asyncio.sleep(0)
    await provider.store.close()
    with pytest.raises(NoToken, match="not fetched any more"):
        await asking
    await provider.store.close()


async def test_token_is_renewed_in_time_when_nobody_calls() -> None:
    clock, renewed = SystemClock(), asyncio.Event()
    count = 0

    async def fetch() -> Token:
        nonlocal count
        count += 1
        if count == 2:
            renewed.set()
        now = clock.monotonic()
        return Token(f"token-{count}", now + 0.01, now + 100.0)

    store = TokenStore(clock)
    with mock.patch("filters.stores.tokens.FIRST_WAIT_S", 0.01):
        await store.get(fetch)
        async with asyncio.timeout(5.0):
            await renewed.wait()
        await store.close()


def test_a_token_never_shows_itself() -> None:
    token = Token("secret-value", 10.0, 20.0)
    assert "secret-value" not in f"{token!r} {token}"


async def test_whoever_asks_last_says_how_to_fetch(provider: Provider) -> None:
    other = Provider()
    await provider.get()
    assert await provider.store.get(other.fetch)
    provider.clock.turn(LIFE_S)
    await provider.store.get(other.fetch)
    assert (provider.count, other.count) == (1, 1)
