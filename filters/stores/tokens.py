"""A token that credentials were exchanged for: fetched once, kept, renewed before it expires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from filters.signers.scheme import CannotSign, Token
from sidecar.api import Clock, FetchFailed

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
"""After a fetch that failed, the next one waits so long: doubled each time, up to the longest."""
NEW_S = 10.0
"""A token that is refused within that time of its fetch was never good."""


class TokenFailed(Exception):
    """There is no token; the message says why and holds no secret."""


class TokenStore:
    """The token of one credential. One fetch at a time, whoever asks and however many.

    While the token is good, nobody waits: a renewal runs beside the calls, and one that fails is
    tried again.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._fetch: Callable[[], Awaitable[Token]]
        self._on_fetch: Callable[[str | None], None]
        self._token: Token | None = None
        self._running: asyncio.Task[Token] | None = None
        self._failure = ""
        self._failures = 0
        self._not_before = 0.0
        self._fetched_at = 0.0

    def fetch_by(
        self, fetch: Callable[[], Awaitable[Token]], on_fetch: Callable[[str | None], None]
    ) -> None:
        """From now on fetch so: the store outlives the configuration that made it. `on_fetch` is
        told the result of each fetch: None, or why it failed."""
        self._fetch, self._on_fetch = fetch, on_fetch

    def current(self) -> Token | None:
        """The token, if it is good; starts a renewal when it is time for one."""
        token, now = self._token, self._clock.wall()
        if token is None or token.expires_at <= now:
            return None
        if token.refresh_at <= now and self._may_fetch():
            self._start()
        return token

    async def get(self) -> Token:
        """The token, fetched if there is no good one. Raises `TokenFailed`."""
        token = self.current()
        if token is not None:
            return token
        if not self._may_fetch() and self._running is None:
            raise TokenFailed(self._failure)
        task = self._running or self._start()
        # The fetch goes on for the others when one who waits for it leaves.
        return await asyncio.shield(task)

    def refused(self, token: Token) -> bool:
        """The provider does not take it: the next who asks gets a new one.

        True when it was new: then the credentials are to blame, and the next fetch has to wait.
        """
        if self._token is not token:
            return False  # it was replaced already
        self._token = None
        now = self._clock.monotonic()
        is_new = now - self._fetched_at < NEW_S
        if is_new:
            self._not_before = now + NEW_S
            self._failure = "the provider refuses the token that it gave"
        return is_new

    def close(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def _may_fetch(self) -> bool:
        return self._running is None and self._clock.monotonic() >= self._not_before

    def _start(self) -> asyncio.Task[Token]:
        loop = asyncio.get_running_loop()
        task = self._running = loop.create_task(self._renew(), name="fetch token")
        task.add_done_callback(_seen)
        return task

    async def _renew(self) -> Token:
        try:
            token = await self._fetch()
        except (CannotSign, FetchFailed) as error:
            wait_s = min(FIRST_WAIT_S * 2**self._failures, LONGEST_WAIT_S)
            self._failures = min(self._failures + 1, 10)
            self._not_before = self._clock.monotonic() + wait_s
            self._failure = str(error)
            self._on_fetch(self._failure)
            raise TokenFailed(self._failure) from None
        finally:
            self._running = None
        self._token, self._failures, self._failure = token, 0, ""
        self._fetched_at = self._clock.monotonic()
        self._on_fetch(None)
        return token

    def __repr__(self) -> str:
        return f"<TokenStore {self._token!r} failures={self._failures}>"


def _seen(task: asyncio.Task[Token]) -> None:
    """Nobody may be waiting: a failure was told by `on_fetch`."""
    if not task.cancelled():
        task.exception()
