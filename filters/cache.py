"""Answers that were given before, and identical calls that share one."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from importlib.util import find_spec
from random import random
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from filters.algo.cache_key import (
    IGNORED_FIELDS,
    IGNORED_HEADERS,
    Wish,
    is_refusal_for_good,
    key_of,
    may_repeat,
    read_wish,
    refusal_key,
)
from filters.algo.refusals import read_refusal
from filters.algo.sharing import Scope, Sharing
from filters.stores.answers import (
    BYPASS,
    HEADER,
    HIT,
    JOIN,
    KEY_HEADER,
    MISS,
    entry_of,
    may_keep,
    replay,
)
from filters.stores.cache import CacheStore, CacheStoreSettings, Entry, MemoryCache, open_cache
from filters.stores.cache_panel import CachePanel
from filters.stores.flights import Flight, Recorded, Room
from sidecar.api import (
    CACHED,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Ground,
    HeaderName,
    Kit,
    Reply,
    within_deadline,
)

REFUSALS = CacheStoreSettings(
    max_bytes=4 * 1024 * 1024, max_entries=1000, max_entry_bytes=64 * 1024
)


class Cache(CallFilter):
    """Answers a call that was asked before, and lets identical calls wait for one answer.

    Switch it on where the same questions come again: evaluations, agents that start over, tests,
    embeddings. Only calls that ask for the same answer each time are kept (temperature 0,
    embeddings), unless `any_temperature` says otherwise. Place it behind `token_counter` and
    limits, and before whatever waits or chooses: queue, router, retry.
    """

    class Config(CacheStoreSettings):
        """Where answers are kept, and how many (`CacheStoreSettings`), for how long, and whose."""

        ttl_s: PositiveFloat = 3600.0
        """An answer is used that long at most."""
        ttl_jitter_s: NonNegativeFloat = 300.0
        """Each is forgotten by chance up to so much earlier, so that they do not all end at
        once."""
        negative_ttl_s: NonNegativeFloat = 60.0
        """So long a refusal is used that will not change (malformed request, no such model);
        0: not at all."""
        any_temperature: bool = False
        """Also keep answers to calls that ask for a different one each time."""
        scope: Scope = "team"
        """Who shares answers: a team, callers with the same key, or everybody here."""
        normalise_prompt: bool = False
        """Prompts that differ only in white space or in how Unicode writes a character are the
        same."""
        ignore_fields: list[str] = []
        """Further fields of a body that do not change the answer."""
        ignore_headers: list[HeaderName] = []
        """Further headers that do not change the answer: of a tracing system of your own, say."""
        single_flight: bool = True
        """Identical calls that are under way at the same time make one upstream call."""
        replay: Literal["at_once", "rhythm"] = "at_once"
        """How a recorded stream comes: at once, or as it came the first time."""

        @model_validator(mode="after")
        def _expires(self) -> Self:
            if self.ttl_jitter_s >= self.ttl_s:
                raise ValueError("ttl_jitter_s must be less than ttl_s")
            return self

        def lacks(self, ground: Ground) -> Iterable[tuple[tuple[str | int, ...], str]]:
            if self.backend == "disk" and not ground.has_data_dir:
                yield ("backend",), "disk keeps answers in `data_dir`: set that, or choose memory"
            if self.backend == "redis" and not ground.has_store:
                yield ("backend",), "redis keeps answers in the `store`: set that, or choose memory"
            if self.bloom and find_spec("rbloom") is None:
                yield ("bloom",), "needs the package rbloom (extra `bloom`): install it"

    config: Config

    gives = frozenset({CACHED})
    needs = frozenset({USAGE})
    taps_events = True

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._skip = IGNORED_FIELDS.union(config.ignore_fields)
        self._skip_headers = IGNORED_HEADERS.union(
            name.encode("latin-1") for name in config.ignore_headers
        )
        told = (sorted(self._skip), sorted(self._skip_headers), config.normalise_prompt)
        self._sharing = Sharing(config.scope, kit.team, kit.places, told)
        self._flights: dict[tuple[str, bool], Flight] = {}  # by key and form
        self._room = Room(config.max_bytes)
        self._known: dict[bytes, bytes] = {}
        results = kit.metrics.counter(
            "llm_sidecar_cache", "Calls by what the cache did for them.", ("team", "result")
        )
        self._hits, self._misses, self._joins, self._bypasses = (
            results.child(kit.team, word) for word in ("hit", "miss", "join", "bypass")
        )
        self._store: CacheStore
        self._memory: MemoryCache | None = None
        self._refusals: MemoryCache
        self._panel: CachePanel

    async def start(self) -> None:
        config = self.config
        # These alone: teams that differ in the others share a store.
        where = {name: getattr(config, name) for name in CacheStoreSettings.model_fields}
        self._store = open_cache(self.kit, CacheStoreSettings(**where))
        if isinstance(self._store, MemoryCache):
            self._memory = self._store
        # In memory whatever the backend: they are few, short, and of no use for long.
        refusals = open_cache(self.kit, REFUSALS)
        assert isinstance(refusals, MemoryCache)
        self._refusals = refusals
        self._panel = self.kit.panel("cache", CachePanel)
        self._panel.add(config.backend, self._store)
        self._panel.add("refusals", self._refusals)

    # A call

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if may_repeat(call, self.config.any_temperature):  # of most calls nothing else is asked
            wish = read_wish(call.headers)
            key = self._key_of(call) if wish.may_store else None
            if key is not None:
                call.put_reply_field(KEY_HEADER, key.encode())
                return self._answer(call, call_next, key, wish)
        if call.endpoint.has_model:
            self._bypasses.value += 1
            call.put_reply_field(HEADER, BYPASS)
        return call_next(call)

    async def _answer(self, call: Call, call_next: CallNext, key: str, wish: Wish) -> Reply:
        flights, is_shared = self._flights, wish.max_age_s is None
        flight_key = (key, call.is_stream)
        is_counted = False
        while True:
            flight = flights.get(flight_key) if is_shared else None
            if flight is None:
                entry = await self._find(call, key, wish)
                if entry is not None and (reply := self._replay(call, entry)) is not None:
                    return reply
                if is_shared:  # it may have begun while we looked
                    flight = flights.get(flight_key)
            if not is_counted:  # one that waited in vain asks again
                is_counted = True
                (self._misses if flight is None else self._joins).value += 1
            if flight is not None:
                call.put_reply_field(HEADER, JOIN)
                member = flight.join(call)
                call.on_end(member.ended)
            else:
                call.put_reply_field(HEADER, MISS)
                flight = self._open_flight(call, key, is_shared=is_shared)
                member = flight.join(call)
                call.on_end(member.ended)
                flight.start(call_next)
            async with within_deadline(call, self.kit.clock.monotonic()):
                reply = await member.reply()
            if reply is not None:
                return reply

    def _key_of(self, call: Call) -> str | None:
        return key_of(
            call,
            self._sharing.parts(call),
            skip=self._skip,
            skip_headers=self._skip_headers,
            normalise_text=self.config.normalise_prompt,
            known=self._known,
        )

    # A hit

    async def _find(self, call: Call, key: str, wish: Wish) -> Entry | None:
        if wish.max_age_s == 0.0:
            return None
        memory = self._memory
        entry = memory.get_now(key) if memory is not None else await self._store.get(key)
        if entry is None and len(self._refusals):
            entry = self._refusals.get_now(refusal_key(key, call))
        if entry is None or wish.max_age_s is None:
            return entry
        return entry if self.kit.clock.wall() - entry.created_at <= wish.max_age_s else None

    def _replay(self, call: Call, entry: Entry) -> Reply | None:
        reply = replay(call, entry, self.kit.clock)
        if reply is not None:
            self._hits.value += 1
            call.put_reply_field(HEADER, HIT)
        return reply

    # A miss

    def _open_flight(self, call: Call, key: str, *, is_shared: bool) -> Flight:
        flight = Flight(
            call,
            self.kit,
            self,
            key=key,
            begun_after=self._panel.purges,
            room=self._room,
            max_bytes=self.config.max_entry_bytes,
            keeps_times=self.config.replay == "rhythm",
        )
        if is_shared and self.config.single_flight:
            self._flights[key, flight.is_stream] = flight
        return flight

    def closed(self, flight: Flight) -> None:
        key = (flight.key, flight.is_stream)
        if self._flights.get(key) is flight:
            del self._flights[key]

    def landed(self, flight: Flight, recorded: Recorded) -> None:
        """Keep a whole answer, if it may be given again."""
        key, call = flight.key, flight.call
        if flight.begun_after != self._panel.purges:  # what it answers was to be forgotten
            return
        if recorded.encoding and recorded.encoding != "identity":
            return
        data = b"".join(recorded.pieces)
        if len(data) > self.config.max_entry_bytes:
            return
        status = recorded.status
        if status == 200:
            if may_keep(call, recorded.media_type, data):
                ttl_s = self.config.ttl_s - random() * self.config.ttl_jitter_s
                self._put(self._store, key, call, recorded, data, ttl_s)
        elif self.config.negative_ttl_s:
            codes = read_refusal(data, recorded.headers).codes
            if is_refusal_for_good(status, codes):
                ttl_s = self.config.negative_ttl_s
                self._put(self._refusals, refusal_key(key, call), call, recorded, data, ttl_s)

    def _put(
        self,
        store: CacheStore,
        key: str,
        call: Call,
        recorded: Recorded,
        data: bytes,
        ttl_s: float,
    ) -> None:
        entry = entry_of(
            call,
            self.kit.team,
            recorded.status,
            recorded.headers,
            recorded.media_type,
            data,
            now=self.kit.clock.wall(),
            ttl_s=ttl_s,
            rhythm=_rhythm(recorded),
        )
        store.put(key, entry)


def _rhythm(recorded: Recorded) -> tuple[tuple[int, int], ...]:
    times = recorded.times
    if not times:
        return ()
    first = times[0]
    return tuple(
        (round((at - first) * 1000), len(piece))
        for at, piece in zip(times, recorded.pieces, strict=True)
    )
