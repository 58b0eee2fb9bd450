"""A token is fetched once, kept, renewed before it expires; nobody waits while it is good."""

from __future__ import annotations

import asyncio

import pytest

from filters.signers.scheme import CannotSign, Token
from filters.stores.tokens import LONGEST_WAIT_S, NEW_S, TokenFailed, TokenStore
from sidecar.api import FetchFailed
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
        self.results: list[str | None] = []
        self.store = TokenStore(self.clock)
        self.store.fetch_by(self.fetch, self.results.append)

    async def fetch(self) -> Token:
        self.count += 1
        number = self.count
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        now = self.clock.wall()
        return Token(f"token-{number}", now + REFRESH_S, now + LIFE_S)

    async def settled(self) -> None:
        """Return once no fetch is running."""
        while self.store._running is not None:
            await asyncio.wait((self.store._running,))


async def test_first_who_asks_waits_for_the_fetch_and_the_others_do_not() -> None:
    provider = Provider()
    assert provider.store.current() is None
    assert (await provider.store.get()).value == "token-1"
    assert (await provider.store.get()).value == "token-1"
    assert provider.count == 1


async def test_many_who_ask_at_once_share_one_fetch() -> None:
    provider = Provider()
    provider.answer.clear()
    asking = [asyncio.ensure_future(provider.store.get()) for _ in range(50)]
    await asyncio.sleep(0)
    provider.answer.set()
    assert {token.value for token in await asyncio.gather(*asking)} == {"token-1"}
    assert provider.count == 1


async def test_one_who_leaves_does_not_end_the_fetch_of_the_others() -> None:
    provider = Provider()
    provider.answer.clear()
    first, second = (asyncio.ensure_future(provider.store.get()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    provider.answer.set()
    assert (await second).value == "token-1"
    assert first.cancelled()
    assert provider.count == 1


async def test_renewal_runs_beside_the_calls_before_the_token_expires() -> None:
    provider = Provider()
    await provider.store.get()
    provider.clock.turn(REFRESH_S)
    provider.answer.clear()
    for _ in range(5):
        assert (await provider.store.get()).value == "token-1"
    provider.answer.set()
    await provider.settled()
    assert (await provider.store.get()).value == "token-2"
    assert provider.count == 2


@pytest.mark.parametrize("error", [FetchFailed("away"), CannotSign("invalid_client")])
async def test_failed_renewal_keeps_the_token_while_it_is_good(error: Exception) -> None:
    provider = Provider()
    await provider.store.get()
    provider.clock.turn(REFRESH_S)
    provider.error = error
    assert (await provider.store.get()).value == "token-1"
    await provider.settled()
    assert (await provider.store.get()).value == "token-1"
    assert provider.results == [None, str(error)]
    provider.clock.turn(LIFE_S - REFRESH_S)
    with pytest.raises(TokenFailed, match=str(error)):
        await provider.store.get()


async def test_renewal_that_failed_is_tried_again_with_growing_pauses() -> None:
    provider = Provider()
    await provider.store.get()
    provider.clock.turn(REFRESH_S)
    provider.error = FetchFailed("away")
    pauses = []
    for _ in range(9):
        before = provider.count
        waited = 0.0
        while provider.count == before:
            await provider.store.get()
            await provider.settled()
            if provider.count == before:
                provider.clock.turn(0.5)
                waited += 0.5
        pauses.append(waited)
    assert pauses[:4] == [0.0, 1.0, 2.0, 4.0]
    assert max(pauses) == LONGEST_WAIT_S


async def test_without_a_token_a_failure_is_told_at_once_until_the_pause_is_over() -> None:
    provider = Provider()
    provider.error = FetchFailed("away")
    for _ in range(3):
        with pytest.raises(TokenFailed, match="away"):
            await provider.store.get()
    assert provider.count == 1
    provider.error = None
    provider.clock.turn(1.0)
    assert (await provider.store.get()).value == "token-2"


async def test_expired_token_is_never_used() -> None:
    provider = Provider()
    await provider.store.get()
    provider.clock.turn(LIFE_S)
    assert provider.store.current() is None
    assert (await provider.store.get()).value == "token-2"


async def test_token_that_the_provider_refuses_later_is_fetched_anew() -> None:
    provider = Provider()
    token = await provider.store.get()
    provider.clock.turn(NEW_S)
    assert not provider.store.refused(token)
    assert (await provider.store.get()).value == "token-2"


async def test_fresh_token_that_is_refused_blames_the_credentials_and_is_not_fetched_at_once() -> (
    None
):
    provider = Provider()
    token = await provider.store.get()
    assert provider.store.refused(token)
    with pytest.raises(TokenFailed, match="refuses the token"):
        await provider.store.get()
    provider.clock.turn(NEW_S)
    assert (await provider.store.get()).value == "token-2"


async def test_late_refusal_of_an_old_token_does_not_touch_the_new_one() -> None:
    provider = Provider()
    old = await provider.store.get()
    provider.clock.turn(NEW_S)
    provider.store.refused(old)
    new = await provider.store.get()
    assert not provider.store.refused(old)
    assert provider.store.current() is new


async def test_closing_ends_a_fetch_that_is_under_way() -> None:
    provider = Provider()
    provider.answer.clear()
    asking = asyncio.ensure_future(provider.store.get())
    await asyncio.sleep(0)
    provider.store.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
    provider.store.close()


def test_a_token_never_shows_itself() -> None:
    token = Token("secret-value", 10.0, 20.0)
    assert "secret-value" not in f"{token!r} {token}"


async def test_newest_way_to_fetch_is_used_and_the_token_is_kept() -> None:
    first, second = Provider(), Provider()
    store = first.store
    await store.get()
    store.fetch_by(second.fetch, second.results.append)
    assert (await store.get()).value == "token-1"
    first.clock.turn(LIFE_S)
    await store.get()
    assert (first.count, second.count) == (1, 1)
    assert second.results == [None]
