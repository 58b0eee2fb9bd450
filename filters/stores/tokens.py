"""A token that credentials were exchanged for: fetched once, kept, renewed before it expires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from sidecar.api import Clock

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
"""After a fetch that failed, the next one waits so long: doubled each time, up to the longest."""

NEW_S = 10.0
"""A token that is refused within that time of its fetch was never good."""


class Token(NamedTuple):
    """What credentials were exchanged for. Times are seconds of a clock that its maker names."""

    value: str
    refresh_at: float
    """From then on a new one should be fetched; this one is still good."""
    expires_at: float

    def __repr__(self) -> str:
        return f"<Token refresh_at={self.refresh_at:.0f} expires_at={self.expires_at:.0f}>"


class NoToken(Exception):
    """There is no token; the message says why and holds no secret."""


Fetch = Callable[[], Awaitable[Token]]
"""Brings a token whose times are of the monotonic clock. Raises `NoToken`, and nothing else."""


class TokenStore:
    """The token of one credential. One fetch at a time, whoever asks and however many.

    While the token is good, nobody waits: a renewal runs beside the calls, at its time even when
    nobody calls, and one that fails is tried again. Whoever asks says how to fetch, so that the
    configuration that is live decides it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._token: Token | None = None
        self._is_suspect = False
        self._fetched_at = 0.0
        self._fetch: Fetch | None = None
        self._running: asyncio.Task[Token] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure = ""
        self._failures = 0
        self._not_before = 0.0

    def current(self, fetch: Fetch) -> Token | None:
        """The token, if it is good and nobody has to wait for a better one."""
        self._fetch = fetch
        token, now = self._token, self._clock.monotonic()
        if token is None or token.expires_at <= now:
            return None
        if token.refresh_at <= now or self._is_suspect:
            self._renew()
        return None if self._is_suspect and self._running is not None else token

    async def get(self, fetch: Fetch) -> Token:
        """The token, fetched if there is no good one. Raises `NoToken`."""
        token = self.current(fetch)
        if token is not None:
            return token
        task = self._renew()
        if task is None:
            raise NoToken(self._failure)
        try:
            # The fetch goes on for the others when one who waits for it leaves.
            return await asyncio.shield(task)
        except NoToken:
            if self._token is not None and self._clock.monotonic() < self._token.expires_at:
                return self._token  # under suspicion; still better than none
            raise
        except asyncio.CancelledError:
            if task.cancelled():
                raise NoToken("it is not fetched any more") from None
            raise

    def refused(self, token: Token) -> bool:
        """The provider does not take it: a new one is fetched.

        True when it was new: then the credentials are to blame, and nothing is fetched.
        """
        if self._token is not token:
            return False  # it was replaced already
        if self._clock.monotonic() - self._fetched_at < NEW_S:
            return True
        self._is_suspect = True
        self._renew()
        return False

    async def close(self) -> None:
        """Fetch no more; a fetch that is under way is given up."""
        if self._timer is not None:
            self._timer.cancel()
        running, self._fetch = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.wait((running,))

    def _renew(self) -> asyncio.Task[Token] | None:
        """The fetch that runs, or a new one; None while one that failed has to pause."""
        fetch = self._fetch
        if self._running is None and fetch is not None:
            if self._clock.monotonic() < self._not_before:
                return None
            loop = asyncio.get_running_loop()
            self._running = loop.create_task(self._replace(fetch), name="fetch token")
            self._running.add_done_callback(self._ended)
        return self._running

    async def _replace(self, fetch: Fetch) -> Token:
        try:
            token = await fetch()
        except NoToken as error:
            pause_s = min(FIRST_WAIT_S * 2**self._failures, LONGEST_WAIT_S)
            self._failures = min(self._failures + 1, 10)
            self._not_before = self._clock.monotonic() + pause_s
            self._failure = str(error)
            self._look_again(pause_s)
            raise
        self._token, self._is_suspect = token, False
        self._failures, self._failure, self._not_before = 0, "", 0.0
        self._fetched_at = self._clock.monotonic()
        self._look_again(token.refresh_at - self._fetched_at)
        return token

    def _look_again(self, delay_s: float) -> None:
        """Renew in time, also when nobody calls; not for a token that nobody ever got."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._token is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(delay_s, FIRST_WAIT_S), self._renew_if_due)

    def _renew_if_due(self) -> None:
        if self._token is None:
            return
        left_s = self._token.refresh_at - self._clock.monotonic()
        if left_s > 0:  # a timer may be early
            self._look_again(left_s)
        else:
            self._renew()

    def _ended(self, task: asyncio.Task[Token]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # seen, though nobody may be waiting

    def __repr__(self) -> str:
        return f"<TokenStore {self._token!r} failures={self._failures}>"
