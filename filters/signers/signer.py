"""Signs the attempts at one upstream, and learns from how they are answered."""

from __future__ import annotations

import os
import zlib
from math import inf
from typing import Any

from filters.algo.http_time import retry_after_s, unix_time
from filters.algo.key_pool import AllResting, KeyPool, KeyState
from filters.signers import find
from filters.signers.scheme import CannotSign, Credentials, Request, Signed, Token
from filters.signers.settings import SET_ASIDE_S, PoolSettings, SignSettings, digest, reference
from filters.stores.tokens import TokenFailed, TokenStore
from sidecar.api import (
    Attempt,
    AttemptNext,
    End,
    Kit,
    Phase,
    Rejected,
    Reply,
    Retry,
    UpstreamError,
    field,
)

DEFAULT_REST_S = 5.0
LONGEST_REST_S = 24 * 3600.0
"""A key that was told 429 rests for so long without a `Retry-After`, and at most."""

SAME_TIME_S = 2.0
"""A `Date` has whole seconds, and has travelled: nearer than that, it is not the clock."""

LOOKED_AT_BYTES = 4096
"""Of an answer, to find the code that says why it was refused."""


class SignerKey:
    """One credential of an upstream and what was made of it."""

    __slots__ = ("credentials", "fields", "good_until", "name", "tokens")

    def __init__(self, credentials: Credentials, name: str, tokens: TokenStore | None) -> None:
        self.credentials = credentials
        self.name = name
        self.tokens = tokens
        self.fields: dict[bytes, bytes] = {}
        self.good_until = 0.0  # `fields` sign any request until then


class ClockOffset:
    """How far the provider's clock is ahead of ours, as far as we know."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0


class UpstreamSigner:
    """Signs the attempts at one upstream."""

    def __init__(self, upstream: str, settings: SignSettings, kit: Kit) -> None:
        self.url_scheme, self.host = kit.origins[upstream]
        self._upstream = upstream
        self._settings = settings
        self._kit = kit
        self._clock = kit.clock
        self._scheme = scheme = find(settings.scheme)
        self._own_headers = frozenset(name.encode() for name in scheme.own_headers)
        self._needs_body = scheme.needs_body(settings)
        refused = scheme.exchange.refused if scheme.exchange else ()
        self._marks = scheme.expired + refused
        self._marks_within_200 = scheme.expired_within_200 + refused
        self._clock_marks = frozenset(scheme.expired + scheme.expired_within_200)
        metrics, resources = kit.metrics, kit.resources
        self._refusals = metrics.counter(
            "llm_sidecar_key_refusals",
            "Answers that blamed the upstream's key.",
            ("upstream", "key", "status"),
        )
        self._fetches = metrics.counter(
            "llm_sidecar_token_fetches",
            "Exchanges of credentials for a token.",
            ("upstream", "result"),
        )
        self._corrections = metrics.counter(
            "llm_sidecar_clock_corrections",
            "How often an upstream said that our clock is off.",
            ("upstream",),
        ).child(upstream)
        self._offset = resources.get(("sign", upstream, "offset"), ClockOffset)
        self._keys = [
            SignerKey(each, str(number), self._tokens(each))
            for number, each in enumerate(settings.keys, start=1)
        ]
        digests = tuple(digest(each) for each in settings.keys)
        states = [
            resources.get(("sign", upstream, "key", settings.scheme, each), KeyState)
            for each in digests
        ]
        set_aside_s = SET_ASIDE_S
        if isinstance(settings, PoolSettings):
            set_aside_s = settings.set_aside_s
        self._pool = resources.get(
            ("sign", upstream, "pool", settings.scheme, set_aside_s, digests),
            lambda: KeyPool(states, set_aside_s=set_aside_s),
        )
        self.always: dict[bytes, bytes] | None = None
        """Fields that sign every attempt; None: each has to be looked at."""
        if scheme.is_fixed:
            for key in self._keys:
                self._sign(key, Request("GET", self.host, "/", "", (), b""))
                key.good_until = inf
            if len(self._keys) == 1:
                self.always = self._keys[0].fields

    def _tokens(self, credentials: Credentials) -> TokenStore | None:
        exchange, settings, kit = self._scheme.exchange, self._settings, self._kit
        if exchange is None:
            return None

        async def fetch() -> Token:
            request = exchange.request(credentials, settings, self._now())
            answer = await kit.fetch(
                self._upstream, request.method, request.url, request.headers, request.body
            )
            if any(mark in answer.body for mark in exchange.expired):
                self._learn_offset(answer.date)  # for the next try, which comes soon
            return exchange.read(answer.status, answer.body, kit.clock.wall())

        # A settings' text shows every option, and no secret.
        key = ("sign", self._upstream, "token", digest(credentials), repr(settings))
        store = kit.resources.get(key, lambda: TokenStore(kit.clock))
        store.fetch_by(fetch, self._fetched)
        return store

    def _fetched(self, failure: str | None) -> None:
        self._fetches.child(self._upstream, "ok" if failure is None else "failed").inc()
        if failure is not None:
            self._kit.log.warning(
                "token_fetch_failed", extra={"upstream": self._upstream, "reason": failure}
            )

    def _now(self) -> float:
        return self._clock.wall() + self._offset.seconds

    # One attempt

    async def run(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        """Sign the attempt, pass it on, and learn from how the answer begins."""
        if self._needs_body and attempt.upload is not None:
            await attempt.hold_body()
        index = self._choose()
        key = self._keys[index]
        token = await self._token(key) if key.tokens is not None else None
        is_in_url = self._put(attempt, key, token)
        reply = await call_next(attempt)
        self._learn(index, key, token, reply)
        if is_in_url and 300 <= reply.status < 400:
            reply.discard()  # its Location, and its text, may hold the key
            message = "the upstream redirects, which is not followed when the key is in the URL"
            raise UpstreamError(Phase.HEAD, Retry.ELSEWHERE, "upstream_redirects", message)
        return reply

    def _choose(self) -> int:
        try:
            return self._pool.choose(self._clock.monotonic())
        except AllResting as resting:
            raise UpstreamError(
                Phase.SIGN,
                Retry.ELSEWHERE,
                "upstream_keys_resting",
                "the upstream asked every key of ours to wait",
                status=429,
                retry_after_s=resting.wait_s,
            ) from None

    async def _token(self, key: SignerKey) -> Token:
        assert key.tokens is not None
        try:
            return key.tokens.current() or await key.tokens.get()
        except TokenFailed as error:
            message = "the upstream's credentials could not be exchanged for a token"
            raise UpstreamError(
                Phase.SIGN, Retry.ELSEWHERE, "upstream_token_failed", message
            ) from error

    def _put(self, attempt: Attempt, key: SignerKey, token: Token | None) -> bool:
        """Sign the attempt; whether its URL holds a part of that."""
        if token is None and self._now() < key.good_until:
            attempt.headers.put(key.fields)
            return False
        path, _, query = attempt.path.partition("?")
        request = Request(
            attempt.method,
            self.host,
            path,
            query,
            self._headers(attempt),
            attempt.body if attempt.upload is None else None,
        )
        signed = self._sign(key, request, token)
        attempt.headers.put(key.fields)
        if signed.query is None:
            return False
        attempt.path = f"{path}?{signed.query}" if signed.query else path
        return True

    def _headers(self, attempt: Attempt) -> tuple[tuple[str, str], ...]:
        """The fields of the wire, but for the scheme's own, which are taken off."""
        own = self._own_headers
        fields = []
        stale = set()
        for name, value in attempt.headers.raw():
            if name in own:
                stale.add(name)
            else:
                fields.append((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")))
        for name in stale:
            del attempt.headers[name.decode()]
        if (length := attempt.content_length) is not None:
            fields.append(("content-length", str(length)))
        return tuple(fields)

    def _sign(self, key: SignerKey, request: Request, token: Token | None = None) -> Signed:
        credentials: Any = key.credentials if token is None else token
        try:
            signed = self._scheme.sign(
                request, credentials, self._settings, self._now(), os.urandom(16).hex()
            )
        except CannotSign as error:
            raise Rejected(400, "cannot_sign", str(error)) from None
        # The transport writes `host`, which is what was signed.
        key.fields = dict(
            field(name, value) for name, value in signed.headers.items() if name != "Host"
        )
        key.good_until = signed.good_until
        return signed

    # What answers tell

    def ended(self, end: End) -> None:
        """A debt of attempts that `always` signs."""
        if status := end.status:
            self._judge(0, self._keys[0], status, DEFAULT_REST_S)

    def _learn(self, index: int, key: SignerKey, token: Token | None, reply: Reply) -> None:
        status = reply.status
        marks = self._marks if status >= 400 else self._marks_within_200
        if marks and (status >= 400 or reply.body.media_type == "application/json"):
            found = _marks_in(reply, marks)
            is_clock = not found.isdisjoint(self._clock_marks)
            if is_clock and self._learn_offset(reply.headers.get("date")):
                return
            if found and not is_clock and token is not None and key.tokens is not None:
                key.tokens.refused(token)
                return
        if (status == 401 or status == 403) and token is not None and key.tokens is not None:
            is_new = key.tokens.refused(token)
            if not is_new:
                return  # it was good once: a new one is fetched, and the key is not to blame
        rest_s = retry_after_s(reply.headers, self._clock.wall()) if status == 429 else None
        self._judge(index, key, status, DEFAULT_REST_S if rest_s is None else rest_s)

    def _judge(self, index: int, key: SignerKey, status: int, rest_s: float) -> None:
        """What an answer of `status` says of the key; `rest_s` is for 429."""
        if status == 401 or status == 403:
            self._refusals.child(self._upstream, key.name, str(status)).inc()
            if self._pool.refused(index, self._clock.monotonic()):
                self._tell("key_refused", key, status=status)
        elif status == 429:
            self._refusals.child(self._upstream, key.name, "429").inc()
            rest_s = min(rest_s, LONGEST_REST_S)
            self._pool.limited(index, self._clock.monotonic(), rest_s)
        elif status < 500 and self._pool.accepted(index):
            self._tell("key_accepted_again", key)

    def _tell(self, event: str, key: SignerKey, **more: Any) -> None:
        extra = {"upstream": self._upstream, "key": reference(key.credentials), **more}
        self._kit.log.warning(event, extra=extra)

    def _learn_offset(self, date: str | None) -> bool:
        """The provider says that our time is off: take its own from now on, if it is another."""
        theirs = unix_time(date)
        if theirs is None or abs(theirs - self._now()) < SAME_TIME_S:
            return False
        self._offset.seconds = offset_s = theirs - self._clock.wall()
        for key in self._keys:
            key.good_until = 0.0  # no scheme that is fixed looks at the time
        self._corrections.inc()
        self._kit.log.warning(
            "clock_offset_learned", extra={"upstream": self._upstream, "offset_s": round(offset_s)}
        )
        return True


def _marks_in(reply: Reply, marks: tuple[bytes, ...]) -> set[bytes]:
    """Which of `marks` stand in the first bytes of the answer's body, or in its headers."""
    text = reply.body.peek()[:LOOKED_AT_BYTES]
    if reply.body.encoding in ("gzip", "x-gzip", "deflate"):
        try:
            inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
            text = inflate.decompress(text, LOOKED_AT_BYTES)
        except zlib.error:
            pass
    if reply.status >= 400:
        text = b"\n".join([text, *[value for _, value in reply.headers.raw()]])
    return {mark for mark in marks if mark in text}
