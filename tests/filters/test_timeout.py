"""Which timeouts an attempt gets: the upstream's, the team's or the model's."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from filters.timeout import MAX_KEPT, MAX_NAME, Timeout
from sidecar.api import Attempt, AttemptFilter, AttemptNext, Reply, Timeouts
from tests.support.harness import MODEL, FakeUpstream, Harness, Use

UPSTREAM = Timeouts(connect_s=5, first_byte_s=120, silence_s=60, total_s=3600)


class Seen(AttemptFilter):
    """Notes the timeouts that are left of the upstream's."""

    def __init__(self, config: Any, kit: Any) -> None:
        super().__init__(config, kit)
        self.timeouts: list[Timeouts] = []

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        self.timeouts.append(attempt.timeouts)
        return await call_next(attempt)


async def timeouts(settings: dict[str, Any], *models: str, path: str = "") -> list[Timeouts]:
    """What calls to these models get, in their order."""
    upstream = FakeUpstream()
    upstream.timeouts = UPSTREAM
    async with Harness(Use(Timeout, settings), Seen, upstream=upstream) as harness:
        for model in models:
            call = harness.call({"model": model})
            if path:
                call = harness.call(method="GET", path=path, body=b"")
            assert (await harness.run(call)).client.status == 200
        seen = harness.filters[1]
        assert isinstance(seen, Seen)
        return seen.timeouts


async def test_without_settings_the_upstreams_stay() -> None:
    assert await timeouts({}, MODEL) == [UPSTREAM]


async def test_what_is_set_replaces_the_upstreams_and_the_rest_stays() -> None:
    assert await timeouts({"first_byte_s": 7, "total_s": 30.5}, MODEL) == [
        Timeouts(connect_s=5, first_byte_s=7, silence_s=60, total_s=30.5)
    ]


async def test_a_models_go_before_those_of_all() -> None:
    settings = {
        "first_byte_s": 7,
        "silence_s": 8,
        "models": {"o1*": {"first_byte_s": 600}, "o1-mini": {"connect_s": 1}},
    }
    assert await timeouts(settings, "o1-pro", "o1-mini", "gpt", "o1-pro") == [
        Timeouts(connect_s=5, first_byte_s=600, silence_s=8, total_s=3600),
        Timeouts(connect_s=1, first_byte_s=7, silence_s=8, total_s=3600),
        Timeouts(connect_s=5, first_byte_s=7, silence_s=8, total_s=3600),
        Timeouts(connect_s=5, first_byte_s=600, silence_s=8, total_s=3600),
    ]


async def test_call_that_names_no_model_is_of_no_pattern() -> None:
    settings = {"silence_s": 8, "models": {"*": {"silence_s": 9}}}
    (found,) = await timeouts(settings, MODEL, path="/fake/files")
    assert found.silence_s == 8


async def test_every_attempt_starts_from_what_its_upstream_says_now() -> None:
    """A reload may change the upstream and not the filter's settings."""
    async with Harness(Use(Timeout, {"silence_s": 8}), Seen) as harness:
        await harness.run()
        harness.upstream.timeouts = Timeouts(connect_s=1)
        await harness.run()
        seen = harness.filters[1]
        assert isinstance(seen, Seen)
        assert [each.connect_s for each in seen.timeouts] == [5.0, 1.0]
        assert [each.silence_s for each in seen.timeouts] == [8, 8]


async def test_what_is_kept_is_bounded_whatever_models_callers_name() -> None:
    async with Harness(Use(Timeout, {"silence_s": 8})) as harness:
        timeout = harness.filters[0]
        assert isinstance(timeout, Timeout)
        await harness.run(harness.call({"model": "x" * (MAX_NAME + 1)}))
        assert not timeout._kept
        for number in range(MAX_KEPT + 10):
            await harness.run(harness.call({"model": f"model-{number}"}))
        assert 0 < len(timeout._kept) <= MAX_KEPT


@pytest.mark.parametrize(
    "settings",
    [
        {"first_byte_s": 0},
        {"total_s": -1},
        {"models": {"gpt": {"first_bite_s": 1}}},
        {"models": {"gpt": {"first_byte_s": 0}}},
    ],
)
def test_what_cannot_be_a_timeout_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Timeout.Config.model_validate(settings)
