"""Signs the attempts at one upstream: chooses the key, brings its token, changes the head."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterable
from math import inf
from typing import Any
from urllib.parse import unquote_plus

from filters.algo.key_pool import AllResting, KeyPool, KeyState
from filters.signers import find
from filters.signers.answers import DEFAULT_REST_S, Answers, ClockOffset, Sent
from filters.signers.scheme import CannotSign, Credentials, Exchange, Request, Signed
from filters.signers.settings import SET_ASIDE_S, PoolSettings, SignSettings, digest, reference
from filters.stores.tokens import NoToken, Token, TokenStore
from sidecar.api import (
    Attempt,
    AttemptNext,
    End,
    FetchFailed,
    Kit,
    Outcome,
    Phase,
    Rejected,
    Reply,
    Retry,
    UpstreamError,
    field,
    no_key_room,
    within_deadline,
)

REDIRECTS = frozenset({300, 301, 302, 303, 307, 308})


class SignerKey:
    """One credential of an upstream and what was made of it."""

    __slots__ = ("credentials", "fields", "good_until", "offset_s", "signed_at", "tokens")

    def __init__(self, credentials: Credentials, tokens: TokenStore | None) -> None:
        self.credentials = credentials
        self.tokens = tokens
        # These sign any request until then, on the monotonic clock, while the offset is this one.
        self.fields: dict[bytes, bytes] = {}
        self.good_until = 0.0
        self.offset_s = 0.0
        self.signed_at = 0.0


class UpstreamSigner:
    """Signs the attempts at one upstream."""

    def __init__(self, upstream: str, settings: SignSettings, kit: Kit) -> None:
        self.url_scheme, self.host = origin = kit.origins[upstream]
        self._upstream = upstream
        self._settings = settings
        self._kit = kit
        self._clock = kit.clock
        self._scheme = scheme = find(settings.scheme)
        self._own_headers = frozenset(name.encode() for name in scheme.own_headers)
        self._needs_body = scheme.needs_body(settings)
        self._fetches = kit.metrics.counter(
            "llm_sidecar_token_fetches",
            "Exchanges of credentials for a token.",
            ("upstream", "result"),
        )
        # What is known of keys and clock is of this origin: another one knows other keys.
        place = ("sign", upstream, origin, settings.scheme)
        get = kit.resources.get
        self._offset = get((*place, "offset"), ClockOffset)
        self.digests = digests = tuple(digest(each) for each in settings.keys)
        self._states = states = [get((*place, "key", each), KeyState) for each in digests]
        set_aside_s = SET_ASIDE_S
        if isinstance(settings, PoolSettings):
            set_aside_s = settings.set_aside_s
        self._pool = get(
            (*place, "pool", set_aside_s, digests),
            lambda: KeyPool(states, set_aside_s=set_aside_s),
        )
        options = tuple(repr(getattr(settings, name)) for name in scheme.Options.model_fields)
        self._keys = [
            SignerKey(
                credentials,
                get((*place, "token", each, options), lambda: TokenStore(kit.clock))
                if scheme.exchange is not None
                else None,
            )
            for credentials, each in zip(settings.keys, digests, strict=True)
        ]
        references = [reference(each) for each in settings.keys]
        self._answers = Answers(upstream, scheme, self._pool, references, self._offset, kit)
        self.always: dict[bytes, bytes] | None = None
        """Fields that sign every attempt; None: each has to be looked at."""
        if scheme.is_fixed:
            for key in self._keys:
                self._sign(key, Request("GET", self.host, "/", "", (), b""), None)
                key.good_until, key.offset_s = inf, self._offset.seconds
            if len(self._keys) == 1:
                self.always = self._keys[0].fields

    def ended(self, end: End) -> None:
        """A debt of attempts that `always` signs."""
        if end.status == 200 and not self._states[0].is_aside:
            return  # nearly every call
        if end.outcome is Outcome.COMPLETED or end.outcome is Outcome.DISCARDED:
            self._answers.judge(0, end.status, rest_s=DEFAULT_REST_S, chosen_at=inf)

    async def run_fixed(
        self, wait: Awaitable[float], attempt: Attempt, call_next: AttemptNext
    ) -> Reply:
        """What `always` signs, once the answer is here whether the key has room within limits."""
        if wait_s := await wait:
            raise no_key_room(wait_s)
        attempt.headers.put(self._keys[0].fields)
        attempt.on_end(self.ended)
        return await call_next(attempt)

    async def run(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        """Sign the attempt, pass it on, and learn from how the answer begins."""
        if self._needs_body and attempt.upload is not None:
            async with within_deadline(attempt.call, self._clock.monotonic()):
                await attempt.hold_body()
        index, token = await self._choose(attempt)
        key = self._keys[index]
        chosen_at = self._clock.monotonic()
        in_url = self._put(attempt, key, token)
        sent = Sent(index, chosen_at, key.signed_at, key.tokens, token)
        reply = await call_next(attempt)
        try:
            await self._answers.read(sent, reply)
        except BaseException:
            reply.discard()  # nobody else has it in hand yet
            raise
        if in_url:
            if reply.status in REDIRECTS:
                reply.discard()  # its Location, and its text, would show the key
                message = "the upstream redirects, which no call follows whose key is in the URL"
                raise UpstreamError(Phase.HEAD, Retry.ELSEWHERE, "upstream_redirects", message)
            _take_off(in_url, reply)
        return reply

    # Keys and tokens

    async def _choose(self, attempt: Attempt) -> tuple[int, Token | None]:
        """The key for this attempt and, where keys are exchanged for one, its token."""
        exchange, gate = self._scheme.exchange, attempt.key_gate
        attempt.key_gate = None
        failure: Exception | None = None
        full_s: dict[int, float] = {}  # how long each has no room that has none
        for _ in self._keys:
            try:
                index = self._pool.choose(self._clock.monotonic(), full_s)
            except AllResting as resting:
                if failure is None and not full_s:
                    message = "the upstream asked every key of ours to wait"
                    raise UpstreamError(
                        *(Phase.SIGN, Retry.ELSEWHERE, "upstream_keys_resting", message),
                        status=429,
                        retry_after_s=resting.wait_s,
                    ) from None
                if failure is None:
                    raise no_key_room(resting.wait_s) from None
                break
            if gate is not None:
                answer = gate(self.digests[index])
                wait_s = answer if isinstance(answer, float) else await answer
                if wait_s:
                    full_s[index] = wait_s
                    continue
            tokens = self._keys[index].tokens
            if exchange is None or tokens is None:
                return index, None
            try:
                return index, await self._token(index, tokens, exchange, attempt)
            except (NoToken, TimeoutError) as error:
                failure = error  # its neighbours may have one
        if failure is None:
            raise no_key_room(min(full_s.values()))
        late = isinstance(failure, TimeoutError)
        message = "there is no token for the upstream's credentials"
        raise UpstreamError(
            *(Phase.SIGN, Retry.ELSEWHERE, "upstream_token_failed", message),
            status=504 if late else 502,
        ) from failure

    async def _token(
        self, index: int, tokens: TokenStore, exchange: Exchange, attempt: Attempt
    ) -> Token:
        def fetch() -> Awaitable[Token]:
            return self._fetch(index, exchange)

        token = tokens.current(fetch)
        if token is None:
            async with (
                within_deadline(attempt.call, self._clock.monotonic()),
                asyncio.timeout(attempt.timeouts.total_s),
            ):
                token = await tokens.get(fetch)
        return token

    async def _fetch(self, index: int, exchange: Exchange) -> Token:
        """A token, its times on the monotonic clock. Raises `NoToken`."""
        kit, signed_at = self._kit, self._now()
        try:
            request = exchange.request(self._keys[index].credentials, self._settings, signed_at)
            answer = await kit.fetch(
                self._upstream, request.method, request.url, request.headers, request.body
            )
            if any(mark in answer.body for mark in exchange.expired):
                self._answers.learn_offset(answer.date, signed_at)  # for the next try
            now = self._now()
            token = exchange.read(answer.status, answer.body, now)
        except (NoToken, FetchFailed) as error:
            self._fetch_failed(index, str(error))
            raise NoToken(str(error)) from None
        except Exception as error:  # whoever waits for a token must not wait for ever
            kit.log.exception("token_fetch_broke", extra={"upstream": self._upstream})
            self._fetch_failed(index, f"a mistake of ours: {type(error).__name__}")
            raise NoToken("a mistake of ours: the log has token_fetch_broke") from None
        self._fetches.child(self._upstream, "ok").inc()
        ahead = self._clock.monotonic() - now
        return Token(token.value, token.refresh_at + ahead, token.expires_at + ahead)

    def _fetch_failed(self, index: int, reason: str) -> None:
        self._fetches.child(self._upstream, "failed").inc()
        key = reference(self._keys[index].credentials)
        about = {"upstream": self._upstream, "key": key, "number": index + 1, "reason": reason}
        self._kit.log.warning("token_fetch_failed", extra=about)

    def _now(self) -> float:
        """The provider's time, in Unix seconds, as far as we know."""
        return self._clock.wall() + self._offset.seconds

    # The request

    def _put(self, attempt: Attempt, key: SignerKey, token: Token | None) -> list[str]:
        """Sign the attempt; the parameters of its URL that came with that."""
        is_kept = self._clock.monotonic() < key.good_until and token is None
        if is_kept and key.offset_s == self._offset.seconds:
            attempt.headers.put(key.fields)
            return []
        path, _, query = attempt.path.partition("?")
        request = Request(
            attempt.method,
            self.host,
            path,
            query,
            self._headers(attempt),
            attempt.body if attempt.upload is None else None,
            self.url_scheme,
        )
        signed = self._sign(key, request, token)
        attempt.headers.put(key.fields)
        if signed.query is None:
            return []
        attempt.path = f"{path}?{signed.query}" if signed.query else path
        before = set(query.split("&"))
        return [each for each in signed.query.split("&") if each and each not in before]

    def _headers(self, attempt: Attempt) -> tuple[tuple[str, str], ...]:
        """The fields of the wire, but for the scheme's own, which are taken off."""
        if self._answers.are_read:
            # A refusal has to be read, and of what clients accept we can read this.
            accepted = attempt.headers.get("accept-encoding") or "identity"
            if accepted != "identity":
                attempt.headers["accept-encoding"] = "gzip" if "gzip" in accepted else "identity"
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

    def _sign(self, key: SignerKey, request: Request, token: Token | None) -> Signed:
        credentials: Any = key.credentials if token is None else token
        now = self._now()
        try:
            signed = self._scheme.sign(
                request, credentials, self._settings, now, os.urandom(16).hex()
            )
        except CannotSign as error:
            raise Rejected(400, "cannot_sign", str(error)) from None
        # The transport writes `host`, which is what was signed.
        key.fields = dict(
            field(name, value) for name, value in signed.headers.items() if name != "Host"
        )
        key.signed_at, key.offset_s = now, self._offset.seconds
        key.good_until = 0.0
        if signed.good_until:
            key.good_until = self._clock.monotonic() + signed.good_until - now
        return signed


def _take_off(parameters: Iterable[str], reply: Reply) -> None:
    """Remove headers that repeat what we put into the URL, as `Location` of a 201 does."""
    shown = [each for pair in parameters for each in {pair, unquote_plus(pair)}]
    for name, value in reply.headers.items():
        if any(each in value or each in unquote_plus(value) for each in shown):
            del reply.headers[name]
