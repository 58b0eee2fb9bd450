"""What the answers of an upstream tell of its keys, its tokens and its clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from filters.algo.http_time import retry_after_s, unix_time
from filters.algo.key_pool import KeyPool
from filters.signers.scheme import Scheme
from filters.stores.tokens import Token, TokenStore
from sidecar.api import Kit, Reply

DEFAULT_REST_S = 5.0
LONGEST_REST_S = 24 * 3600.0
"""A key that was told 429 rests for so long without a `Retry-After`, and at most."""

SAME_TIME_S = 2.0
"""A `Date` has whole seconds, and has travelled: nearer than that, it is not the clock."""

LOOKED_AT_BYTES = 4096
"""Of an answer, to find the code that says why it was refused."""
LOOKED_FOR_S = 1.0
"""So long the rest of a refusal may take to come."""


class ClockOffset:
    """How far the provider's clock is ahead of ours, as far as we know."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0


class Sent(NamedTuple):
    """How an attempt was signed."""

    number: int
    """The key's place in the pool, from 0."""
    chosen_at: float
    """On the monotonic clock."""
    signed_at: float
    """The time in the signature, in Unix seconds."""
    tokens: TokenStore | None = None
    token: Token | None = None


class Answers:
    """Reads answers, and tells the pool of keys, the token stores and the clock."""

    def __init__(
        self,
        upstream: str,
        scheme: Scheme,
        pool: KeyPool,
        references: Sequence[str],
        offset: ClockOffset,
        kit: Kit,
    ) -> None:
        self._upstream = upstream
        self._scheme = scheme
        self._pool = pool
        self._references = references
        self._offset = offset
        self._kit = kit
        self._clock = kit.clock
        self._refused_marks = scheme.exchange.refused if scheme.exchange is not None else ()
        self.are_read = bool(scheme.expired or self._refused_marks)
        """Whether the bodies of refusals are looked into."""
        self._are_read_within_200 = bool(
            scheme.expired_within_200 or scheme.status_within_200 or self._refused_marks
        )
        self._refusals = kit.metrics.counter(
            "llm_sidecar_key_refusals",
            "Answers that blamed the upstream's key.",
            ("upstream", "key", "status"),
        )
        self._corrections = kit.metrics.counter(
            "llm_sidecar_clock_corrections",
            "How often an upstream said that our clock is off.",
            ("upstream",),
        ).child(upstream)

    async def read(self, sent: Sent, reply: Reply) -> None:
        """Learn from how an answer begins; its bytes stay in hand."""
        status, text = reply.status, b""
        if status >= 400:
            if self.are_read:
                text = await _refusal(reply)
        elif self._are_read_within_200 and reply.body.media_type == "application/json":
            text = reply.peeked(LOOKED_AT_BYTES)
        if text:
            expired = self._scheme.expired if status >= 400 else self._scheme.expired_within_200
            is_clock = any(mark in text for mark in expired)
            if is_clock and self.learn_offset(reply.headers.get("date"), sent.signed_at):
                return
            if any(mark in text for mark in self._refused_marks):
                status = 401
            elif status < 400 and self._scheme.status_within_200 is not None:
                status = self._scheme.status_within_200(text) or status
        if status == 401 and sent.tokens is not None and sent.token is not None:
            is_new = sent.tokens.refused(sent.token)
            if not is_new:
                return  # it was good once: a new one is fetched, and the key is not to blame
        rest_s = DEFAULT_REST_S
        if status == 429:
            # By the clock of whoever wrote the date.
            their_time = unix_time(reply.headers.get("date")) or self._now()
            asked_s = retry_after_s(reply.headers, their_time)
            rest_s = rest_s if asked_s is None else min(asked_s, LONGEST_REST_S)
        self.judge(sent.number, status, rest_s=rest_s, chosen_at=sent.chosen_at)

    def judge(self, index: int, status: int, *, rest_s: float, chosen_at: float) -> None:
        """What an answer of `status` says of a key; `rest_s` is for 429."""
        pool, now = self._pool, self._clock.monotonic()
        if status in (401, 403, 429):
            self._refusals.child(self._upstream, str(index + 1), str(status)).inc()
        if status in (401, 403):
            if pool.refused(index, now):
                self._kit.log.warning("key_refused", extra=self._about(index, status=status))
        elif status == 429:
            if pool.limited(index, now, rest_s):
                about = self._about(index, rest_s=round(rest_s, 1))
                self._kit.log.info("key_rests", extra=about)
        elif 200 <= status < 300 and pool.accepted(index, chosen_at):
            self._kit.log.info("key_accepted_again", extra=self._about(index))

    def learn_offset(self, date: str | None, signed_at: float) -> bool:
        """The provider says that the time signed with is off: take its own from now on.

        False when its `Date` does not say so: then it is not the clock.
        """
        theirs = unix_time(date)
        if theirs is None or abs(theirs - signed_at) < SAME_TIME_S:
            return False
        if abs(theirs - self._now()) >= SAME_TIME_S:  # else another answer has told it meanwhile
            self._offset.seconds = offset_s = theirs - self._clock.wall()
            self._corrections.inc()
            self._kit.log.warning(
                "clock_offset_learned",
                extra={"upstream": self._upstream, "offset_s": round(offset_s)},
            )
        return True

    def _now(self) -> float:
        return self._clock.wall() + self._offset.seconds

    def _about(self, index: int, **more: object) -> dict[str, object]:
        return {
            "upstream": self._upstream,
            "key": self._references[index],
            "number": index + 1,
            **more,
        }


async def _refusal(reply: Reply) -> bytes:
    """The beginning of a refusal's body, with its header values."""
    text = await reply.beginning(LOOKED_AT_BYTES, within_s=LOOKED_FOR_S)
    return b"\n".join([text, *[value for _, value in reply.headers.raw()]])
