"""Records in the shared store, added up: one hash for each minute.

    {prefix}:ledger:{minute}       field `{group}:{measure}`, an integer; minutes since 1970
    {prefix}:ledger:groups:{day}   field `{group}`, what it stands for as JSON; days since 1970

Calls of one group agree in team, model, upstream and so on. Money is an integer of 1e-12 of its
currency's unit, which is what prices of a millionth come to a millionth of. Nothing is counted
twice: what was sent and not answered is counted as lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from functools import lru_cache, partial
from hashlib import blake2b
from math import ceil
from time import time
from typing import TYPE_CHECKING

import orjson

from filters.algo.usage_report import EXACT, MEASURES, SLOT_S, TIMES, Line, Name, Query
from filters.stores.ledger import MINUTE_S, NoLedger, NotWritten, Record, sayable
from filters.stores.redis import Argument, Redis, Script
from sidecar.api import StoreAddress

if TYPE_CHECKING:
    from redis import Redis as Client

DAY_S = 86_400
UNITS = 12
"""Digits behind the point."""
COST = "cost"
MAX_COST = 10**15
"""Of one record, a thousand of the currency's units; hashes count in 64 bits, which nine thousand
such records in a minute fill."""
READ_PATIENCE_S = 10.0
READ_STEP = 500
"""Minutes that are asked for together."""

Group = tuple[Name | None, ...]
"""`GROUP` of calls that are alike."""
GROUP = (
    *("team", "model", "upstream", "upstream_model", "endpoint", "key", "cached", "status"),
    "currency",
)


class RedisLedger:
    """Adds to the sums; a `filters.stores.ledger.Writer`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._script = Script.of("ledger_add.lua")

    async def write(self, records: Sequence[Record], keep_days: int) -> None:
        if not self._redis.is_up:
            raise NotWritten("the shared store is away")
        groups: dict[Group, list[int]] = {}
        minutes = {int(record.time_s) // MINUTE_S for record in records}
        # One answer says what became of all of them.
        assert len(minutes) == 1, "records of several minutes cannot be written at once"
        for record in records:
            amounts = _amounts(record)
            sums = groups.setdefault(_group(record), [0] * len(amounts))
            for index, amount in enumerate(amounts):
                sums[index] += amount
        keys, args = _request(self._redis.prefix, minutes.pop(), groups, keep_days * DAY_S)
        await self._redis.run(self._script, keys, args)

    async def prune(self, before_s: float) -> bool:
        return False  # keys end by themselves

    async def merge(self, before_s: float) -> bool:
        return False  # a hash is of a minute from the beginning

    def __repr__(self) -> str:
        return f"<RedisLedger {self._redis!r}>"


def _group(record: Record) -> Group:
    return (
        *(record.team, sayable(record.model), record.upstream, sayable(record.upstream_model)),
        record.endpoint,
        *(record.key_id, record.cached, record.status, record.currency),
    )


def _amounts(record: Record) -> tuple[int, ...]:
    """As `MEASURES`, and the cost."""
    units = record.cost.scaleb(UNITS, EXACT).to_integral_value(ROUND_HALF_EVEN)
    cost = min(MAX_COST, int(units))
    tokens = (record.input_tokens, record.output_tokens)
    if record.is_side:
        rest: tuple[int, ...] = (0,) * (len(MEASURES) - 3)
        return (*rest, record.calls, *tokens, cost)
    is_cached = record.cached != ""
    return (
        *(record.calls, record.calls if is_cached else 0, *tokens),
        *(record.cached_tokens, record.cache_write_tokens, record.cache_write_1h_tokens),
        *(record.reasoning_tokens, record.calls if record.is_estimated else 0),
        *(tokens if is_cached else (0, 0)),
        *(record.reported_input_tokens, record.reported_output_tokens),
        *(record.lost_input_tokens, record.lost_output_tokens),
        *(0, 0, 0),
        cost,
    )


FIELDS = (*map(str, range(len(MEASURES))), COST)
"""What the fields of a minute end in."""


def _request(
    prefix: str, minute: int, groups: dict[Group, list[int]], keep_s: int
) -> tuple[list[str], list[Argument]]:
    """Keys and arguments of the script."""
    names: list[Argument] = []
    pairs: list[Argument] = []
    for group, sums in groups.items():
        text, digest = _name(group)
        names += (digest, text)
        for field, amount in zip(FIELDS, sums, strict=True):
            if amount:
                pairs += (f"{digest}:{field}", amount)
    return (
        [_minute_key(prefix, minute), _groups_key(prefix, minute * MINUTE_S // DAY_S)],
        [keep_s, len(groups), *names, *pairs],
    )


@lru_cache(maxsize=1024)
def _name(group: Group) -> tuple[bytes, str]:
    """A group as JSON, and the short name that stands for it: hashes with short fields are small
    in the store's memory."""
    text = orjson.dumps(group)
    return text, blake2b(text, digest_size=8).hexdigest()


def _minute_key(prefix: str, minute: int) -> str:
    return f"{prefix}:ledger:{minute}"


def _groups_key(prefix: str, day: int) -> str:
    return f"{prefix}:ledger:groups:{day}"


# Reading


def read_redis(store: StoreAddress, query: Query) -> Iterator[Line]:
    """The lines of the store; times count to the minute. Raises NoLedger."""
    if store.url is None:
        raise ValueError("the configuration names no store")
    try:
        import redis
    except ImportError:
        message = "the store needs the package redis: pip install 'llm-sidecar[redis]'"
        raise NoLedger(message) from None
    options: dict[str, object] = {"ssl_ca_certs": store.ca_file} if store.ca_file else {}
    try:
        client = redis.Redis.from_url(
            store.url.reveal(),
            socket_timeout=READ_PATIENCE_S,
            socket_connect_timeout=READ_PATIENCE_S,
            **options,
        )
        with client:
            yield from _read(client, store.prefix, query)
    except redis.RedisError as error:
        # No text of the server or of the URL: either may show a part of the password.
        raise NoLedger(f"the store cannot be read ({type(error).__name__})") from None


def _read(client: Client, prefix: str, query: Query) -> Iterator[Line]:
    until_s = min(query.until_s, time() + DAY_S)
    first_s, last_s = max(0, int(query.since_s)), ceil(until_s) - 1
    days = range(first_s // DAY_S, last_s // DAY_S + 1)
    for day, named in _hashes(client, days, partial(_groups_key, prefix)):
        groups = {digest: tuple(orjson.loads(text)) for digest, text in named.items()}
        begin_s, end_s = max(first_s, day * DAY_S), min(last_s, (day + 1) * DAY_S - 1)
        minutes = range(begin_s // MINUTE_S, end_s // MINUTE_S + 1)
        for minute, fields in _hashes(client, minutes, partial(_minute_key, prefix)):
            yield from _lines(minute, fields, groups, query)


def _hashes(
    client: Client, numbers: Sequence[int], key_of: Callable[[int], str]
) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """Those of the hashes that there are."""
    for start in range(0, len(numbers), READ_STEP):
        part = numbers[start : start + READ_STEP]
        pipeline = client.pipeline(transaction=False)
        for number in part:
            pipeline.hgetall(key_of(number))
        for number, fields in zip(part, pipeline.execute(), strict=True):
            if fields:
                yield number, fields


def _lines(
    minute: int, fields: Mapping[bytes, bytes], groups: Mapping[bytes, Group], query: Query
) -> Iterator[Line]:
    amounts: dict[bytes, dict[str, int]] = {}
    for field, amount in fields.items():
        digest, _, name = field.partition(b":")
        amounts.setdefault(digest, {})[name.decode()] = int(amount)
    slot_s = minute * MINUTE_S // SLOT_S * SLOT_S
    for digest, found in amounts.items():
        group = groups.get(digest)
        if group is None or not _is_asked(group, query):
            continue
        names = dict(zip(GROUP, group, strict=True)) | dict.fromkeys(TIMES, slot_s)
        currency = names["currency"]
        yield Line(
            names=tuple(names[each] or "" for each in query.by),
            currency=None if currency is None else str(currency),
            cost=Decimal(found.get(COST, 0)).scaleb(-UNITS, EXACT),
            sums=tuple(found.get(each, 0) for each in FIELDS[:-1]),
        )


def _is_asked(group: Group, query: Query) -> bool:
    team, model = group[0], group[1]
    return (query.team is None or team == sayable(query.team)) and (
        query.model is None or model == sayable(query.model)
    )
