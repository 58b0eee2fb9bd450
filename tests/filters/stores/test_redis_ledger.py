"""Sums on a real server: the same as on disk, shared by all, and never counted twice."""

from __future__ import annotations

import itertools
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from math import inf
from pathlib import Path

import pytest

from filters.algo.usage_report import NAMES, Line, Query, Report, report
from filters.stores.disk_ledger import NAME, SCHEMA, DiskLedger, read_disk
from filters.stores.ledger import MINUTE_S, NoLedger, NotWritten, Record
from filters.stores.redis import Redis, Script, StoreDown
from filters.stores.redis_ledger import DAY_S, RedisLedger, read_redis
from filters.stores.sqlite import Database
from sidecar.api import Cost, Secret, StoreAddress, Usage
from sidecar.metrics import Metrics
from tests.support.ledger import NOON_S, cached, record
from tests.support.valkey import Valkey, free_port

pytestmark = pytest.mark.usefixtures("patience")

NOTHING = Script("return 0")
numbers = itertools.count()
EVER = Query(("model",), NOON_S - DAY_S, inf)
HOUR = Query(("model",), NOON_S, NOON_S + 3600)


class Shared:
    """One process that shares the store."""

    def __init__(self, valkey: Valkey, prefix: str) -> None:
        self.address = StoreAddress(Secret(valkey.url), prefix)
        self.redis = Redis(Secret(valkey.url), prefix, Metrics())
        self.ledger = RedisLedger(self.redis)

    async def write(self, *records: Record, keep_days: int = 90) -> None:
        await self.redis.run(NOTHING, [])  # once it answers, it is there
        minutes: dict[int, list[Record]] = {}
        for each in records:
            minutes.setdefault(int(each.time_s) // MINUTE_S, []).append(each)
        for of_one in minutes.values():
            await self.ledger.write(of_one, keep_days)

    def read(self, query: Query = HOUR) -> list[Line]:
        return list(read_redis(self.address, query))


@pytest.fixture
def prefix() -> str:
    return f"ledger{next(numbers)}"


@pytest.fixture
async def shared(valkey: Valkey, prefix: str) -> AsyncIterator[Shared]:
    found = Shared(valkey, prefix)
    yield found
    await found.redis.close()


MIXED = [
    record(usage=Usage(10, 20, 3, 2, 5, 1, False), reported=Usage(10, 20)),
    record(usage=Usage(7, 8, is_estimated=True), reported=Usage(7, 1), lost=Usage(100, 0)),
    record(time_s=NOON_S + 61, status=500, usage=None, reported=None, cost=None),
    record(time_s=NOON_S + 1000, model="claude", team="ads", cost="0.000000000001"),
    record(time_s=NOON_S + 1000, cost=Cost(Decimal("7.5"), "CNY"), key_id=""),
    cached(usage=Usage(10, 20, 3)),
    cached(time_s=NOON_S + 3599, cached="join"),
    record(is_side=True, usage=Usage(4, 0), reported=Usage(4, 0), cost="0", model="embed"),
    record(calls=5, usage=Usage(50, 60), cost="0.5", outcome="client_gone"),
    record(calls=4, usage=Usage(40, 4, is_estimated=True), reported=None, cost="0.25"),
    cached(calls=3, usage=Usage(30, 3)),
    record(calls=2, is_side=True, usage=Usage(8), reported=Usage(8), cost="0", model="embed"),
]


@pytest.mark.parametrize("by", [*((name,) for name in NAMES), NAMES, ("model", "hour")])
async def test_it_tells_what_a_ledger_on_disk_tells(
    shared: Shared, tmp_path: Path, by: tuple[str, ...]
) -> None:
    database = Database(tmp_path / NAME, SCHEMA)
    await DiskLedger(database).write(MIXED, 90)
    await database.close()
    await shared.write(*MIXED)

    def told(lines: list[Line], query: Query) -> Report:
        return report(lines, query, details=True, zone=UTC)

    for team, model in ((None, None), ("search", None), (None, "gpt"), ("ads", "gpt")):
        query = Query(by, NOON_S, NOON_S + 3600, team, model)
        assert told(shared.read(query), query) == told(list(read_disk(tmp_path, query)), query)


async def test_processes_add_to_the_same_sums(shared: Shared, valkey: Valkey, prefix: str) -> None:
    other = Shared(valkey, prefix)
    await shared.write(record(), record())
    await other.write(record())
    (line,) = shared.read()
    assert (line.sums[0], line.cost) == (3, 3 * Decimal("0.0000123"))
    await other.redis.close()


async def test_another_prefix_is_another_ledger(shared: Shared, valkey: Valkey) -> None:
    await shared.write(record())
    assert list(read_redis(StoreAddress(Secret(valkey.url), "nobody"), HOUR)) == []


async def test_times_count_to_the_minute(shared: Shared) -> None:
    await shared.write(record(time_s=NOON_S + 59), record(time_s=NOON_S + 60))
    assert len(shared.read(Query(("model",), NOON_S + 30, NOON_S + 60))) == 1
    assert len(shared.read(Query(("model",), NOON_S + 60, NOON_S + 61))) == 1
    assert shared.read(Query(("model",), NOON_S + 120, inf)) == []


async def test_a_long_time_is_read_day_by_day(shared: Shared) -> None:
    begin_s = datetime(2023, 11, 1, tzinfo=UTC).timestamp()
    records = [record(time_s=begin_s + day * DAY_S - 1) for day in range(1, 15)]
    await shared.write(*records)
    assert sum(line.sums[0] for line in shared.read(Query(("model",), 0.0, inf))) == 14


async def test_sums_end_by_themselves_and_never_earlier_than_anyone_wants(
    shared: Shared, valkey: Valkey, prefix: str
) -> None:
    minute = f"{prefix}:ledger:{int(NOON_S) // MINUTE_S}"
    groups = f"{prefix}:ledger:groups:{int(NOON_S) // DAY_S}"
    for keep_days in (7, 30, 1):
        await shared.write(record(), keep_days=keep_days)
    assert int(valkey.command("TTL", minute)[1:]) == pytest.approx(30 * DAY_S, abs=60)
    assert int(valkey.command("TTL", groups)[1:]) == pytest.approx(31 * DAY_S, abs=60)
    assert not await shared.ledger.prune(NOON_S)


async def test_one_write_is_of_one_minute_so_that_an_answer_speaks_for_all_of_it(
    shared: Shared,
) -> None:
    await shared.write(record())
    with pytest.raises(AssertionError, match="several minutes"):
        await shared.ledger.write([record(), record(time_s=NOON_S + MINUTE_S)], 90)
    (line,) = shared.read()
    assert line.sums[0] == 1


async def test_groups_that_the_server_lost_are_told_again(
    shared: Shared, valkey: Valkey, prefix: str
) -> None:
    await shared.write(record())
    valkey.command("DEL", f"{prefix}:ledger:groups:{int(NOON_S) // DAY_S}")
    await shared.write(record())
    (line,) = shared.read()
    assert line.sums[0] == 2


async def test_what_an_upstream_or_a_caller_makes_up_can_be_written(shared: Shared) -> None:
    most = Usage(10**12, 10**12, 10**12, 10**12, 10**12, 10**12)
    dear = Cost(Decimal("1e40"), "USD")
    model = "\udcff:|\0"
    await shared.write(*[record(usage=most, reported=most, lost=most, model=model, cost=dear)] * 50)
    (line,) = shared.read()
    assert line.names == ("?:|\0",)
    assert line.sums[2] == 50 * 10**12


async def test_thousands_of_absurd_costs_in_one_minute_stop_nobody_s_sums(shared: Shared) -> None:
    dear = record(cost=Cost(Decimal("1e40"), "USD"))
    for _ in range(3):
        await shared.write(*[dear] * 3000)
    await shared.write(record(model="honest", cost="2"))
    costs = {line.names: line.cost for line in shared.read()}
    assert costs == {("gpt",): 9_000_000, ("honest",): 2}


async def test_what_is_smaller_than_its_unit_is_rounded(shared: Shared) -> None:
    await shared.write(record(cost="0.00000000000051"), record(cost="0.0000000000004"))
    (line,) = shared.read()
    assert line.cost == Decimal("0.000000000001")


# Away


async def test_while_the_store_is_away_nothing_is_sent_and_records_may_wait(
    own_valkey: Valkey, prefix: str
) -> None:
    shared = Shared(own_valkey, prefix)
    with pytest.raises(NotWritten):  # it was never there yet
        await shared.ledger.write([record()], 90)
    await shared.write(record())
    own_valkey.stop()
    with pytest.raises((NotWritten, StoreDown)):
        await shared.ledger.write([record()], 90)
    with pytest.raises(NotWritten):
        await shared.ledger.write([record()], 90)
    await shared.redis.close()


async def test_a_store_that_stops_answering_may_have_counted_and_is_not_asked_twice(
    own_valkey: Valkey, prefix: str, impatient: None
) -> None:
    shared = Shared(own_valkey, prefix)
    await shared.write(record())
    own_valkey.pause()
    with pytest.raises(StoreDown):
        await shared.ledger.write([record()], 90)
    own_valkey.resume()
    await shared.redis.close()


def test_reading_from_a_store_that_is_not_there_says_so_and_shows_no_secret() -> None:
    port = free_port()
    address = StoreAddress(Secret(f"redis://user:hunter2@127.0.0.1:{port}/0"))
    with pytest.raises(NoLedger, match=r"the store cannot be read \(ConnectionError\)") as caught:
        list(read_redis(address, EVER))
    assert "hunter2" not in str(caught.value)


def test_reading_with_a_wrong_password_says_so(prefix: str) -> None:
    with Valkey("--requirepass", "right") as server:
        address = StoreAddress(Secret(f"redis://:wrong@127.0.0.1:{server.port}/0"), prefix)
        with pytest.raises(NoLedger, match=r"\(AuthenticationError\)"):
            list(read_redis(address, EVER))


def test_reading_does_not_wait_for_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.stores.redis_ledger.READ_PATIENCE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = StoreAddress(Secret(f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))
        with pytest.raises(NoLedger, match=r"\(TimeoutError\)"):
            list(read_redis(address, EVER))
