"""What a provider still allows, learned from the rate-limit headers of its answers.

    UNKNOWN ──an answer says what remains──► KNOWN ──nothing remains──► EXHAUSTED ──reset──► KNOWN
    any ──429 with a time to wait──► RESTING ──its time──► as before

What remains is by the last answer; attempts that have gone out since, and have no answer yet, are
taken off. No library: limiters count what we send, and not what others send with the same key.
Sources: OpenAI API, "Rate limits"; Azure OpenAI, "Rate limiting headers"; Anthropic API, "Rate
limits"; Qianfan v2 sends OpenAI's names and no reset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from filters.algo.http_time import unix_time
from filters.algo.reset_time import duration_s, rfc3339_time

LONGEST_REST_S = 3600.0
"""A reset or Retry-After that is further off is believed for so long."""
BLIND_REST_S = 1.0
"""Nothing remains, and nobody says until when."""
IN_FLIGHT_REST_S = 0.25
"""What remains is spoken for by attempts without an answer: their answers will tell."""

FRESH_S = 0.05
"""So long the next answers need not be read, while half of everything remains: reading costs more
than all else here, and at 20 calls a second nothing is left out."""

KINDS = ("requests", "tokens", "input-tokens", "output-tokens")
REQUESTS, TOKENS, INPUT, OUTPUT = NUMBERS = range(4)
_LIMIT, _REMAINING, _RESET = range(3)
_WHATS = ("limit", "remaining", "reset")

DATE = -1
PLACES: Mapping[bytes, int] = {
    **{
        f"x-ratelimit-{what}-{kind}".encode(): 3 * number + place
        for number, kind in enumerate(KINDS[:2])
        for place, what in enumerate(_WHATS)
    },
    **{
        f"anthropic-ratelimit-{kind}-{what}".encode(): 3 * number + place
        for number, kind in enumerate(KINDS)
        for place, what in enumerate(_WHATS)
    },
    b"date": DATE,
}

_MAX_DIGITS = 15

Found = dict[int, bytes]


def read(fields: Iterable[tuple[bytes, bytes]]) -> Found:
    """The fields of an answer that speak of limits, by their place; empty when none does. In one
    pass: answers have twenty fields, and looking for each name would cost more than all else
    here."""
    places = PLACES
    found: Found = {}
    for name, value in fields:
        if name in places:
            found[places[name]] = value
    return {} if len(found) == 1 and DATE in found else found


class Quota:
    """One kind of what is allowed."""

    __slots__ = ("_their_time", "limit", "remaining", "reset", "reset_at", "seen_at")

    def __init__(self) -> None:
        self.limit = 0  # 0: not known
        self.remaining: int | None = None
        self.reset: bytes | None = None  # as it was written: most are never needed
        self.reset_at: float | None = None
        self.seen_at = 0.0
        self._their_time = 0.0

    def said(self, found: Found, place: int, now: float, wall: float) -> bool:
        """Take what an answer says; False when it says nothing to be believed.

        A value of -1, or a remainder of 0 of no limit, means nothing (Azure).
        """
        text, limit = found.get(place + _REMAINING), found.get(place + _LIMIT)
        if text is None or not text.isdigit() or len(text) > _MAX_DIGITS:
            return False
        remaining, count = int(text), 0
        if limit is not None and limit.isdigit() and len(limit) <= _MAX_DIGITS:
            count = int(limit)
        reset = found.get(place + _RESET)
        if not remaining and not count and (limit is not None or reset is None):
            return False
        self.remaining, self.limit, self.reset = remaining, count, reset
        self.seen_at, self._their_time, self.reset_at = now, wall, None
        if reset is not None and (date := found.get(DATE)) is not None and b"T" in reset:
            self._their_time = unix_time(date.decode("latin-1")) or wall
        return True

    @property
    def is_ample(self) -> bool:
        """Half of it remains, or more."""
        return self.remaining is not None and 2 * self.remaining >= self.limit > 0

    def opens_at(self) -> float:
        """When all of it is there again, on the monotonic clock."""
        if self.reset_at is None:
            rest_s = None
            if self.reset is not None:
                text = self.reset.decode("latin-1")
                rest_s = duration_s(text)
                if rest_s is None and (moment := rfc3339_time(text)) is not None:
                    rest_s = moment - self._their_time
            rest_s = BLIND_REST_S if rest_s is None else min(max(rest_s, 0.0), LONGEST_REST_S)
            self.reset_at = self.seen_at + rest_s
        return self.reset_at

    def wait_s(self, now: float, amount: int, in_flight: int) -> float:
        """How long `amount` has to wait; 0: it may go."""
        remaining = self.remaining
        if remaining is None:
            return 0.0
        if self.limit and amount > self.limit:
            amount = self.limit
        if remaining >= amount + in_flight:
            return 0.0
        opens_at = self.opens_at()
        if now >= opens_at:  # all of it is there again
            self.remaining = remaining = self.limit or None
            self.seen_at, self.reset, self.reset_at = now, None, None
            if remaining is None or remaining >= amount + in_flight:
                return 0.0
            return IN_FLIGHT_REST_S
        if in_flight and remaining >= amount:
            return min(opens_at - now, IN_FLIGHT_REST_S)
        return opens_at - now

    def spend(self, amount: int) -> None:
        """An attempt is over whose answer did not say what remains."""
        if self.remaining is not None:
            self.remaining = max(0, self.remaining - amount)


class Allowance:
    """What one key may still ask of one model. Times are of one monotonic clock, in seconds."""

    __slots__ = ("fresh_until", "in_flight", "input", "is_known", "output", "quotas", "rests_until")

    def __init__(self) -> None:
        self.is_known = False  # some answer has said something; before, only `in_flight` counts
        self.rests_until = 0.0
        self.fresh_until = 0.0
        self.quotas: dict[int, Quota] = {}
        # Attempts that have gone out and have no answer yet, and their tokens.
        self.in_flight = 0
        self.input = 0
        self.output = 0

    @property
    def knows_tokens(self) -> bool:
        """Whether what an attempt takes has to be estimated."""
        return len(self.quotas) > (REQUESTS in self.quotas)

    def wait_s(self, now: float, tokens_in: int, tokens_out: int) -> tuple[float, str]:
        """How long an attempt has to wait, and for which kind; 0: it may go."""
        wait_s, kind = self.rests_until - now, "retry-after"
        if wait_s < 0.0:
            wait_s = 0.0
        for number, quota in self.quotas.items():
            if number == REQUESTS:
                each_s = quota.wait_s(now, 1, self.in_flight)
            elif number == TOKENS:
                each_s = quota.wait_s(now, tokens_in + tokens_out, self.input + self.output)
            elif number == INPUT:
                each_s = quota.wait_s(now, tokens_in, self.input)
            else:
                each_s = quota.wait_s(now, tokens_out, self.output)
            if each_s > wait_s:
                wait_s, kind = each_s, KINDS[number]
        return wait_s, kind

    def begin(self, tokens_in: int, tokens_out: int) -> None:
        """An attempt goes out."""
        self.in_flight += 1
        self.input += tokens_in
        self.output += tokens_out

    def end(
        self,
        tokens_in: int,
        tokens_out: int,
        found: Found | None = None,
        now: float = 0.0,
        wall: float = 0.0,
    ) -> None:
        """Its answer has begun, with these fields; None: it was not read, or there is none."""
        self.withdraw(tokens_in, tokens_out)
        quotas = self.quotas
        if found:
            self.is_known = True
            for number in NUMBERS:
                if number not in quotas and 3 * number + _REMAINING in found:
                    quotas[number] = Quota()
        is_ample = bool(found and quotas)
        for number, quota in quotas.items():
            if found is None or not quota.said(found, 3 * number, now, wall):
                quota.spend((1, tokens_in + tokens_out, tokens_in, tokens_out)[number])
                is_ample = False
            elif not quota.is_ample:
                is_ample = False
        if is_ample:
            self.fresh_until = now + FRESH_S

    def said_nothing(self, now: float) -> None:
        """No answer has said anything so far, and this one does not."""
        self.in_flight -= 1
        self.fresh_until = now + FRESH_S

    def withdraw(self, tokens_in: int, tokens_out: int) -> None:
        """An attempt that had begun was never sent."""
        self.in_flight -= 1
        self.input -= tokens_in
        self.output -= tokens_out

    def rest(self, now: float, rest_s: float) -> None:
        """The provider asked to wait, 429: nothing goes out for so long."""
        self.is_known = True
        self.rests_until = max(self.rests_until, now + min(rest_s, LONGEST_REST_S))

    def forget(self) -> None:
        """Start anew; attempts in flight stay counted."""
        self.quotas.clear()
        self.rests_until = self.fresh_until = 0.0

    def __repr__(self) -> str:
        left = {KINDS[number]: quota.remaining for number, quota in self.quotas.items()}
        return f"<Allowance {left} in_flight={self.in_flight} rests_until={self.rests_until:.1f}>"
