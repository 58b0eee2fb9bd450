"""The connection to the shared store answers or fails within 50 ms, and heals by itself."""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from filters.stores import redis as module
from filters.stores.redis import Redis, Script, StoreDown, open_redis
from sidecar.api import Secret
from sidecar.filter import StoreAddress
from sidecar.metrics import Metrics
from tests.support.harness import Harness, Use
from tests.support.valkey import Valkey, free_port

pytestmark = pytest.mark.usefixtures("patience")

WITHIN_S = 0.05
SLACK_S = 0.05
"""For a busy machine; what is measured is far from the seconds of a wrong time-out."""
HEALS_WITHIN_S = 5.0

ECHO = Script("return ARGV[1]")
COUNT = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
WRONG = Script("return redis.call('HGET', KEYS[1])")


class Desk:
    """Connections to be closed after the test, and their metrics."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.opened: list[Redis] = []
        self.prefix = f"test-{time.monotonic_ns()}"

    def open(self, url: str, ca_file: str | None = None) -> Redis:
        redis = Redis(Secret(url), self.prefix, self.metrics, ca_file=ca_file)
        self.opened.append(redis)
        redis.connect_soon()
        return redis

    def value(self, name: str, *labels: str) -> float:
        for family in self.metrics.snapshot():
            if family["name"] == f"llm_sidecar_store_{name}":
                return sum(value for each, value in family["samples"] if each == list(labels))
        raise AssertionError(f"no metric {name}")


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    for redis in desk.opened:
        await redis.close()


class Terminator:
    """TLS in front of a server that has none; gives its port."""

    def __init__(self, valkey: Valkey, context: ssl.SSLContext) -> None:
        self._valkey = valkey
        self._context = context
        self._pipes: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await asyncio.gather(*self._pipes)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._valkey.port)
        for source, sink in ((reader, back), (there, writer)):
            self._pipes.append(asyncio.ensure_future(pipe(source, sink)))


async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
    except OSError:
        pass
    finally:
        sink.close()


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(HEALS_WITHIN_S):
        while not holds():  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.002)


async def fails(redis: Redis) -> float:
    """Seconds until `run` failed."""
    begun = time.perf_counter()
    with pytest.raises(StoreDown):
        await redis.run(ECHO, [], ["x"])
    return time.perf_counter() - begun


# Answers


async def test_script_answers_by_port_and_by_unix_socket(valkey: Valkey, desk: Desk) -> None:
    for url in (valkey.url, valkey.unix_url):
        redis = desk.open(url)
        assert await redis.run(ECHO, [], ["x"]) == b"x"
        assert redis.is_up


async def test_database_user_and_password_of_the_url_are_used(desk: Desk) -> None:
    with Valkey("--requirepass", "s3cret/@x") as server:
        url = f"redis://default:s3cret%2F%40x@127.0.0.1:{server.port}/3"
        assert await desk.open(url).run(COUNT, ["in-three"], [1]) == 1
        wrong = desk.open(f"redis://:wr0ng@127.0.0.1:{server.port}/3")
        await fails(wrong)
        assert desk.value("errors", "auth") == 1


async def test_store_is_reached_over_tls(valkey: Valkey, desk: Desk, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with Terminator(valkey, context) as port:
        redis = desk.open(f"rediss://127.0.0.1:{port}/0", ca_file=f"{tmp_path}/ca.pem")
        await until(lambda: redis.is_up)
        assert await redis.run(ECHO, [], ["x"]) == b"x"
        stranger = desk.open(f"rediss://127.0.0.1:{port}/0")
        await fails(stranger)
        await redis.close()
        await stranger.close()


async def test_answers_come_in_the_order_of_the_questions(valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(valkey.url)
    key = f"{desk.prefix}:count"
    asked = []
    for number in range(200):
        if number % 3 == 2:
            redis.post(COUNT, [key], [1000])
        else:
            asked.append(redis.run(COUNT, [key], [1]))
    answers = await asyncio.gather(*asked)
    assert answers == sorted(answers)
    assert await redis.run(COUNT, [key], [0]) == 66 * 1000 + 134


async def test_questions_of_one_turn_of_the_loop_go_out_together(
    valkey: Valkey, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redis.asyncio.connection import AbstractConnection

    redis = desk.open(valkey.url)
    await redis.run(ECHO, [], ["x"])
    sent: list[int] = []
    real = AbstractConnection.pack_commands

    def pack_commands(self: Any, commands: Any) -> Any:
        sent.append(len(commands))
        return real(self, commands)

    monkeypatch.setattr(AbstractConnection, "pack_commands", pack_commands)
    answers = await asyncio.gather(*(redis.run(ECHO, [], [n]) for n in range(50)))
    assert answers == [b"%d" % n for n in range(50)]
    assert sent == [50]


async def test_script_that_the_server_has_forgotten_is_sent_again(
    valkey: Valkey, desk: Desk
) -> None:
    redis = desk.open(valkey.url)
    key = f"{desk.prefix}:count"
    assert await redis.run(COUNT, [key], [1]) == 1
    valkey.command("SCRIPT", "FLUSH")
    asked = [redis.run(COUNT, [key], [1]) for _ in range(5)]
    assert sorted(await asyncio.gather(*asked)) == [2, 3, 4, 5, 6]
    assert await redis.run(COUNT, [key], [1]) == 7
    assert redis.is_up


async def test_script_that_fails_fails_alone(valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(valkey.url)
    wrong, right = redis.run(WRONG, ["k"]), redis.run(ECHO, [], ["x"])
    outcomes = await asyncio.gather(wrong, right, return_exceptions=True)
    assert isinstance(outcomes[0], StoreDown)
    assert outcomes[1] == b"x"
    assert redis.is_up
    assert desk.value("errors", "refused") == 1


async def test_caller_that_is_cancelled_disturbs_nobody(valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(valkey.url)
    await redis.run(ECHO, [], ["x"])
    leaving = asyncio.ensure_future(redis.run(ECHO, [], ["left"]))
    await asyncio.sleep(0)
    staying = asyncio.ensure_future(redis.run(ECHO, [], ["stayed"]))
    leaving.cancel()
    assert await staying == b"stayed"
    assert redis.is_up


# Away


async def test_refused_port_fails_at_once(valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(f"redis://127.0.0.1:{free_port()}/0")
    assert await fails(redis) < WITHIN_S + SLACK_S
    assert await fails(redis) < 0.005
    assert not redis.is_up
    assert desk.value("errors", "connection") == 1


@pytest.mark.usefixtures("impatient")
async def test_server_that_hangs_fails_within_50_ms_and_then_at_once(
    own_valkey: Valkey, desk: Desk
) -> None:
    redis = desk.open(own_valkey.url)
    await redis.run(ECHO, [], ["x"])
    own_valkey.pause()
    waits = await asyncio.gather(*(fails(redis) for _ in range(20)))
    assert max(waits) < WITHIN_S + SLACK_S
    assert await fails(redis) < 0.005
    assert desk.value("errors", "timeout") == 1
    assert desk.value("up") == 0
    own_valkey.resume()
    await until(lambda: redis.is_up)
    assert await redis.run(ECHO, [], ["x"]) == b"x"
    assert desk.value("up") == 1


@pytest.mark.usefixtures("impatient")
async def test_server_that_hangs_before_the_first_connection_fails_within_50_ms(
    own_valkey: Valkey, desk: Desk
) -> None:
    own_valkey.pause()
    redis = desk.open(own_valkey.url)
    assert await fails(redis) < WITHIN_S + SLACK_S
    own_valkey.resume()
    await until(lambda: redis.is_up)


@pytest.mark.usefixtures("impatient")
async def test_answer_that_came_while_the_loop_was_busy_is_no_failure(
    valkey: Valkey, desk: Desk
) -> None:
    redis = desk.open(valkey.url)
    await redis.run(ECHO, [], ["x"])
    asking = asyncio.ensure_future(redis.run(ECHO, [], ["late"]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - blocks the loop on purpose
    assert await asking == b"late"
    assert redis.is_up


async def test_server_that_was_restarted_is_found_again_and_knows_the_scripts(
    own_valkey: Valkey, desk: Desk
) -> None:
    redis = desk.open(own_valkey.url)
    assert await redis.run(COUNT, ["k"], [5]) == 5
    await asyncio.to_thread(own_valkey.stop)
    await until(lambda: not redis.is_up)
    assert await fails(redis) < 0.005
    await asyncio.to_thread(own_valkey.start)
    await until(lambda: redis.is_up)
    assert await redis.run(COUNT, ["k"], [1]) == 1


async def test_server_that_may_not_be_written_to_is_away(own_valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(own_valkey.url)
    await redis.run(ECHO, [], ["x"])
    own_valkey.command("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(StoreDown):
        await redis.run(COUNT, ["k"], [1])
    await until(lambda: not redis.is_up)
    assert desk.value("errors", "readonly") == 1
    own_valkey.command("REPLICAOF", "NO", "ONE")
    await until(lambda: redis.is_up)
    assert await redis.run(COUNT, ["k"], [1]) == 1


async def test_one_line_is_logged_when_it_goes_and_one_when_it_comes(
    own_valkey: Valkey, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="filters.stores.redis")
    redis = desk.open(own_valkey.url)
    await until(lambda: redis.is_up)
    await asyncio.to_thread(own_valkey.stop)
    await until(lambda: not redis.is_up)
    for _ in range(20):
        await fails(redis)
    await asyncio.to_thread(own_valkey.start)
    await until(lambda: redis.is_up)
    assert [each.message for each in caplog.records] == ["store_up", "store_down", "store_up"]


@pytest.mark.usefixtures("impatient")
async def test_posts_are_dropped_and_counted_while_it_is_away(
    own_valkey: Valkey, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = desk.open(own_valkey.url)
    await redis.run(ECHO, [], ["x"])
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    own_valkey.pause()
    for _ in range(15):
        redis.post(COUNT, ["k"], [1])
    assert desk.value("dropped") == 5
    await until(lambda: not redis.is_up)
    assert desk.value("dropped") == 15
    redis.post(COUNT, ["k"], [1])
    assert desk.value("dropped") == 16
    own_valkey.resume()


# Who else is there


async def test_processes_count_each_other_and_say_goodbye(valkey: Valkey, desk: Desk) -> None:
    first = desk.open(valkey.url)
    await until(lambda: first.replicas == 1)
    second = desk.open(valkey.url)
    await until(lambda: second.replicas == 2)
    await first.close()
    third = desk.open(valkey.url)
    await until(lambda: third.replicas == 2)


async def test_process_that_died_is_not_counted_after_its_lease(
    valkey: Valkey, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago = 1_000_000
    valkey.command("ZADD", f"{desk.prefix}:replicas", long_ago, "dead")
    redis = desk.open(valkey.url)
    await until(lambda: redis.replicas == 1)


async def test_listeners_are_told_at_first_and_at_every_beat(
    valkey: Valkey, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    redis = desk.open(valkey.url)
    beats: list[bool] = []

    def listener() -> None:
        beats.append(redis.is_up)

    redis.on_beat(listener)
    await until(lambda: len(beats) >= 3)
    assert all(beats)
    redis.off_beat(listener)
    seen = len(beats)
    await redis.run(ECHO, [], ["x"])
    assert len(beats) == seen


# Opening and closing


async def test_closed_connection_answers_nobody_and_leaves_no_gauge(
    valkey: Valkey, desk: Desk
) -> None:
    redis = desk.open(valkey.url)
    await redis.run(ECHO, [], ["x"])
    assert desk.value("up") == 1
    await redis.close()
    await redis.close()
    assert await fails(redis) < 0.005
    redis.post(COUNT, ["k"], [1])
    assert desk.value("up") == 0


@pytest.mark.usefixtures("impatient")
async def test_closing_does_not_wait_for_a_server_that_hangs(
    own_valkey: Valkey, desk: Desk
) -> None:
    redis = desk.open(own_valkey.url)
    await redis.run(ECHO, [], ["x"])
    own_valkey.pause()
    begun = time.perf_counter()
    await redis.close()
    assert time.perf_counter() - begun < WITHIN_S + 2 * SLACK_S


async def test_what_was_posted_before_closing_is_done(valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(valkey.url)
    await redis.run(ECHO, [], ["x"])
    redis.post(COUNT, [f"{desk.prefix}:last"], [7])
    await redis.close()
    assert valkey.command("GET", f"{desk.prefix}:last") == b"$1\r\n7\r\n"


async def test_filters_of_one_process_share_one_connection(valkey: Valkey) -> None:
    from filters.request_id import RequestId

    store = StoreAddress(Secret(valkey.url), f"test-{time.monotonic_ns()}")
    uses = (Use(RequestId), Use(RequestId))
    async with Harness(*uses, store=store) as harness:
        first, second = (open_redis(each.kit) for each in harness.filters)
        assert first is second
        assert await first.run(ECHO, [], ["x"]) == b"x"


async def test_missing_package_is_named_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(RuntimeError, match=r"pip install 'llm-sidecar\[redis\]'"):
        Redis(Secret("redis://127.0.0.1:1/0"), "t", Metrics())


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:pa55word@127.0.0.1:1/0",
        "redis://:pa55word@127.0.0.1:1/0?socket_timeout=100",
        "unix://user:pa55word@/nowhere/valkey.sock",
        "rediss://:pa55word@127.0.0.1:1/0",
    ],
)
async def test_password_is_never_shown(
    url: str, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    redis = desk.open(url)
    with pytest.raises(StoreDown) as failure:
        await redis.run(ECHO, [], ["x"])
    shown = [repr(redis), redis.address, repr(failure.value)]
    shown += [f"{each.getMessage()} {each.__dict__}" for each in caplog.records]
    assert not [each for each in shown if "pa55word" in each]


@pytest.mark.parametrize(
    "url", ["redis://:pa55/word@127.0.0.1:1/0", "http://:pa55word@127.0.0.1/", "redis://h:70000"]
)
def test_address_that_is_none_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="not the URL of a Redis") as failure:
        Redis(Secret(url), "t", Metrics())
    assert "pa55" not in repr(failure.value)
    assert failure.value.__suppress_context__


async def test_state_is_shown(valkey: Valkey, desk: Desk) -> None:
    redis = desk.open(valkey.url)
    assert repr(redis) == f"<Redis {valkey.url} NEW replicas=0>"
    await until(lambda: redis.is_up)
    assert repr(redis) == f"<Redis {valkey.url} UP replicas=1>"
