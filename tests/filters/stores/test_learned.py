"""What operators see of the learned limits, and may do about them."""

from __future__ import annotations

import orjson
import pytest

from filters.algo.allowance import Allowance, read
from filters.stores.learned import Learned
from tests.support.harness import FakeClock

HERE, THERE = ("https", "here.test"), ("https", "there.test")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def learned(clock: FakeClock) -> Learned:
    learned = Learned(clock)
    allowance = learned.of("openai", HERE)["gpt", "0123456789abcdef"] = Allowance()
    allowance.begin(0, 0)
    fields = [(b"x-ratelimit-remaining-requests", b"0"), (b"x-ratelimit-reset-requests", b"9s")]
    allowance.end(0, 0, read(fields), clock.monotonic(), clock.wall())
    allowance.rest(clock.monotonic(), 5.0)
    return learned


async def test_shows_what_remains_and_how_long_a_key_rests(
    learned: Learned, clock: FakeClock
) -> None:
    clock.turn(2.0)
    shown = orjson.loads(orjson.dumps(await learned.show()))
    assert shown == {
        "openai": [
            {
                "model": "gpt",
                "key": "01234567",
                "in_flight": 0,
                "rests_s": 3.0,
                "remaining": {"requests": 0},
            }
        ]
    }


async def test_what_is_forgotten_holds_nothing_back(learned: Learned, clock: FakeClock) -> None:
    shown = await learned.act({"forget": "openai"})
    assert shown["openai"][0]["remaining"] == {}
    (allowance,) = learned.of("openai", HERE).values()
    assert allowance.wait_s(clock.monotonic(), 0, 0)[0] == 0.0


@pytest.mark.parametrize("command", [{}, {"forget": "none"}, {"forget": "openai", "x": 1}])
async def test_another_command_is_told_what_to_write(
    learned: Learned, command: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="with one of: openai"):
        await learned.act(command)


def test_another_origin_allows_something_else(learned: Learned) -> None:
    assert learned.of("openai", THERE) == {}
    assert len(learned.of("openai", HERE)) == 1


async def test_what_is_in_use_is_shown_also_when_another_origin_was_known_since(
    learned: Learned,
) -> None:
    learned.of("openai", THERE)  # a reload, and then the configuration of before again
    assert len((await learned.show())["openai"]) == 1
