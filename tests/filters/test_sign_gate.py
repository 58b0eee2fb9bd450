"""`sign` asks whoever limits the upstream before it uses a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from filters.sign import Sign
from filters.signers.settings import SignSettings, digest
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Phase,
    Reply,
    Retry,
    Secret,
    UpstreamError,
)
from sidecar.headers import Headers
from tests.support.harness import Harness, Run, Use

AWS = {
    "scheme": "AWS4-HMAC-SHA256",
    "access_key_id": Secret("AKIDEXAMPLE"),
    "secret_access_key": Secret("secret-access-key"),
    "region": "us-east-1",
}


class Gate(AttemptFilter):
    """Lets keys wait as the test says; a key is known by its place."""

    digests: tuple[str, ...] = ()
    waits_s: tuple[float, ...] = ()

    def __init__(self, config: Any, kit: Any) -> None:
        super().__init__(config, kit)
        self.asked: list[int | str] = []

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        attempt.key_gate = self.ask
        return await call_next(attempt)

    async def ask(self, key: str) -> float:
        if key not in self.digests:
            self.asked.append(key)
            return 0.0
        index = self.digests.index(key)
        self.asked.append(index)
        return self.waits_s[index]


def gated(values: Mapping[str, Any] | None, *waits_s: float) -> Harness:
    sections = {}
    digests: tuple[str, ...] = ()
    if values is not None:
        section = SignSettings.variant(values).model_validate(dict(values))
        sections = {"fake": section}
        digests = tuple(digest(each) for each in section.keys)
    gate = type("Gate", (Gate,), {"digests": digests, "waits_s": waits_s})
    return Harness(gate, Use(Sign, {}, sections))


def pool(*keys: str) -> dict[str, Any]:
    return {"scheme": "bearer", "pool": [{"key": Secret(key)} for key in keys]}


def asked(harness: Harness) -> list[int | str]:
    (gate, _) = harness.filters
    assert isinstance(gate, Gate)
    return gate.asked


def refused_s(run: Run) -> float | None:
    error = run.client.error
    assert isinstance(error, UpstreamError)
    assert (error.phase, error.retry) == (Phase.ADMIT, Retry.ELSEWHERE)
    assert (error.status, error.code) == (429, "upstream_limit_reached")
    return error.retry_after_s


@pytest.mark.parametrize("values", [{"scheme": "bearer", "key": Secret("a")}, pool("a"), AWS])
async def test_a_single_key_is_used_once_it_has_room(values: dict[str, Any]) -> None:
    async with gated(values, 0.0) as harness:
        assert (await harness.run()).client.status == 200
        assert asked(harness) == [0]
        assert "authorization" in harness.upstream.sent[0].headers
    async with gated(values, 2.5) as harness:
        assert refused_s(await harness.run()) == 2.5
        assert not harness.upstream.sent


async def test_keys_without_room_are_skipped() -> None:
    async with gated(pool("a", "b", "c"), 9.0, 0.0, 5.0) as harness:
        for _ in range(3):
            assert (await harness.run()).client.status == 200
        assert {each.headers["authorization"] for each in harness.upstream.sent} == {"Bearer b"}


async def test_when_none_has_room_the_first_that_will_have_it_counts() -> None:
    async with gated(pool("a", "b", "c"), 9.0, 4.0, 5.0) as harness:
        assert refused_s(await harness.run()) == 4.0
        assert asked(harness) == [0, 1, 2]


async def test_a_key_that_rests_is_not_asked_for_and_may_be_the_first_again() -> None:
    async with gated(pool("a", "b"), 0.0, 9.0) as harness:

        async def too_many(attempt: Attempt) -> Reply:
            reply = Reply.of(429, b"{}")
            reply.headers = Headers({"retry-after": "3"})
            return reply

        harness.upstream.answer = too_many
        assert (await harness.run()).client.status == 429
        assert asked(harness) == [0]
        assert refused_s(await harness.run()) == pytest.approx(3.0)
        assert asked(harness) == [0, 1]


async def test_an_upstream_without_credentials_asks_for_nobodys_key() -> None:
    async with gated(None) as harness:
        assert (await harness.run()).client.status == 200
        assert asked(harness) == [""]
