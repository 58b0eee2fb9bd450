"""Answers to questions that mean the same as one that was asked before."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from hashlib import blake2b
from importlib.util import find_spec
from random import random
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from filters.algo.cache_key import (
    IGNORED_FIELDS,
    IGNORED_HEADERS,
    Wish,
    key_of,
    may_repeat,
    read_wish,
)
from filters.algo.question import CONVERSATIONS, Question, question_of
from filters.algo.sharing import Scope, Sharing
from filters.stores.answers import (
    BYPASS,
    HEADER,
    HIT,
    KEY_HEADER,
    MISS,
    entry_of,
    may_keep,
    replay,
)
from filters.stores.cache_panel import CachePanel
from filters.stores.embeddings import FAILED, LATE, Embedder
from filters.stores.entry import Entry, size_of
from filters.stores.flights import Room
from filters.stores.purge import purge
from sidecar.api import (
    CACHED,
    COMPLETED,
    SIDE_CALLS,
    USAGE,
    Call,
    CallFilter,
    CallNext,
    Counter,
    End,
    FilterConfig,
    Ground,
    HeaderName,
    Headers,
    Histogram,
    Kit,
    Metrics,
    Reply,
)

if TYPE_CHECKING:
    from filters.algo.vectors import Vector, VectorIndex

PANEL = "semantic_cache"
SIMILARITY_HEADER = b"x-sidecar-cache-similarity"

LOOKS = 4
"""So many of the nearest answers are tried: one may be too old for the caller, or have no form that
it asks for."""
ROUNDING = 1e-6
"""The product of a vector with itself is not always 1."""
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.999)


class SemanticCache(CallFilter):
    """Answers a call whose last question means the same as one that was answered before.

    Switch it on where many people ask the same few things in their own words: help desks, product
    questions. Two questions count as the same when the cosine of their embeddings is at least
    `threshold`, and everything else about the calls is the same exactly. An answer to another
    question than the one that was asked can be the result: try the threshold with your own
    questions first. Each call that is looked up costs an embedding. Place it behind `cache`, so
    that an exact hit needs none, and before whatever waits or chooses: queue, router, retry.
    """

    class Config(FilterConfig):
        embedding_model: str
        """A model of this configuration (`models`) whose upstreams have OpenAI's
        `/v1/embeddings`."""
        threshold: float = Field(default=0.95, gt=0.0, le=1.0)
        """The least similarity of a hit: the cosine of two embeddings."""
        timeout_s: PositiveFloat = 1.0
        """A call whose embedding is later goes on without."""
        max_question_chars: PositiveInt = 2000
        """Longer questions are passed by: embeddings of long texts differ too little."""
        ttl_s: PositiveFloat = 3600.0
        """An answer is used that long at most."""
        ttl_jitter_s: NonNegativeFloat = 300.0
        """Each is forgotten by chance up to so much earlier."""
        any_temperature: bool = False
        """Also keep answers to calls that ask for a different one each time."""
        scope: Scope = "team"
        """Who shares answers: a team, callers with the same key, or everybody here."""
        ignore_fields: list[str] = []
        """Further fields of a body that do not change the answer."""
        ignore_headers: list[HeaderName] = []
        """Further headers that do not change the answer: of a tracing system of your own, say."""
        max_entries: int = Field(default=1000, ge=1, le=10_000)
        """Answers kept in each process; the one unused for longest goes first."""
        max_bytes: PositiveInt = 64 * 1024 * 1024
        """Of all answers kept with their embeddings, in each process, and of those still coming."""
        max_entry_bytes: PositiveInt = 1024 * 1024
        """A longer answer is not kept."""

        def lacks(self, ground: Ground) -> Iterable[tuple[tuple[str | int, ...], str]]:
            dialect = ground.dialect_of(self.embedding_model)
            if dialect is None:
                yield ("embedding_model",), f'"{self.embedding_model}" is not among `models`'
            elif dialect != "openai":
                message = f'"{self.embedding_model}" is at an upstream of the {dialect} dialect'
                yield ("embedding_model",), f"{message}: name one with OpenAI's `/v1/embeddings`"
            if find_spec("numpy") is None:
                yield (), "needs the package numpy (extra `semantic`): install it"

        @model_validator(mode="after")
        def _fits(self) -> SemanticCache.Config:
            if self.ttl_jitter_s >= self.ttl_s:
                raise ValueError("ttl_jitter_s must be less than ttl_s")
            if self.max_entry_bytes > self.max_bytes:
                raise ValueError("max_entry_bytes must not be more than max_bytes")
            return self

    config: Config

    gives = frozenset({CACHED, SIDE_CALLS})
    needs = frozenset({USAGE})
    taps_events = True

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        # The messages stand in the key without the question.
        self._skip = IGNORED_FIELDS.union(config.ignore_fields, ("messages",))
        self._skip_headers = IGNORED_HEADERS.union(
            name.encode("latin-1") for name in config.ignore_headers
        )
        told = (sorted(self._skip), sorted(self._skip_headers))
        self._sharing = Sharing(config.scope, kit.team, kit.places, told)
        self._room = Room(config.max_bytes)
        results = kit.metrics.counter(
            "llm_sidecar_semantic_cache",
            "Calls by what the semantic cache did for them.",
            ("team", "result"),
        )
        self._hits, self._misses, self._bypasses = (
            results.child(kit.team, word) for word in ("hit", "miss", "bypass")
        )
        self._without: dict[str, Counter] = {
            word: results.child(kit.team, word) for word in (LATE, FAILED)
        }
        self._similarities: Histogram = kit.metrics.histogram(
            "llm_sidecar_semantic_cache_similarity",
            "Of the nearest answer to a question, where there is one.",
            ("team",),
            SIMILARITIES,
        ).child(kit.team)
        self._embedder: Embedder
        self._answers: Answers

    async def start(self) -> None:
        try:
            from filters.algo.vectors import VectorIndex, unit
        except ImportError:
            raise RuntimeError(
                "semantic_cache needs the package numpy: pip install 'llm-sidecar[semantic]'"
            ) from None
        kit, config = self.kit, self.config
        model = config.embedding_model
        targets = kit.find_model(model)
        if not targets:
            raise ValueError(f'semantic_cache: "{model}" is not among `models`')
        try:
            self._embedder = Embedder(kit, model, targets, unit=unit, timeout_s=config.timeout_s)
        except ValueError as error:
            raise ValueError(f"semantic_cache: {error}") from None
        self._answers = kit.resources.get(
            ("semantic_cache", config.max_bytes, config.max_entries),
            lambda: Answers(VectorIndex(config.max_bytes, config.max_entries), kit.metrics),
        )
        kit.panel(PANEL, CachePanel).add("memory", self._answers)

    # A call

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        if (call.dialect.name, call.endpoint.name) not in CONVERSATIONS:
            return call_next(call)
        wish = read_wish(call.headers)
        if may_repeat(call, self.config.any_temperature) and wish.may_store:
            question = question_of(call.dialect.name, call.endpoint.name, call.json)
            if question is not None and len(question.text) <= self.config.max_question_chars:
                key = key_of(
                    call,
                    (b"question", *self._sharing.parts(call), question.rest),
                    skip=self._skip,
                    skip_headers=self._skip_headers,
                )
                if key is not None:
                    return self._answer(call, call_next, question, key, wish)
        self._bypasses.value += 1
        if call.reply_headers is None or HEADER not in call.reply_headers:
            call.put_reply_field(HEADER, BYPASS)
        return call_next(call)

    async def _answer(
        self, call: Call, call_next: CallNext, question: Question, key: str, wish: Wish
    ) -> Reply:
        call.put_reply_field(HEADER, MISS)
        embedding = await self._embedder.ask(call, call_next, question.text)
        if isinstance(embedding, str):
            self._without[embedding].value += 1
            return await call_next(call)
        vector, by = embedding
        group = f"{key} {by}"
        if wish.max_age_s != 0.0:
            reply = self._find(call, group, vector, wish)
            if reply is not None:
                return reply
        self._misses.value += 1
        recording = Recording(self, call, _entry_key(group, question.text), group, vector)
        call.on_end(recording.ended)
        reply = await call_next(call)
        recording.begin(reply)
        return reply

    def _find(self, call: Call, group: str, vector: Vector, wish: Wish) -> Reply | None:
        """The nearest answer that will do."""
        clock = self.kit.clock
        found = self._answers.index.nearest(group, vector, clock.monotonic(), LOOKS)
        if not found:
            return None
        self._similarities.observe(found[0].similarity)
        for similarity, key, entry in found:
            if similarity < self.config.threshold - ROUNDING:
                return None
            if wish.max_age_s is not None and clock.wall() - entry.created_at > wish.max_age_s:
                continue
            reply = replay(call, entry, clock)
            if reply is None:
                continue
            self._answers.index.use(key)
            self._hits.value += 1
            call.put_reply_field(HEADER, HIT)
            call.put_reply_field(KEY_HEADER, key.encode())
            call.put_reply_field(SIMILARITY_HEADER, b"%.3f" % min(similarity, 1.0))
            return reply
        return None

    # A miss

    def keep(self, recording: Recording, data: bytes) -> None:
        """Keep a whole answer, if it may be given again."""
        call = recording.call
        if not may_keep(call, recording.media_type, data):
            return
        clock, config = self.kit.clock, self.config
        ttl_s = config.ttl_s - random() * config.ttl_jitter_s
        entry = entry_of(
            call,
            self.kit.team,
            200,
            recording.headers,
            recording.media_type,
            data,
            now=clock.wall(),
            ttl_s=ttl_s,
        )
        now = clock.monotonic()
        self._answers.put(recording.key, recording.group, recording.vector, entry, now + ttl_s, now)


class Recording:
    """The answer to one call, while it passes."""

    __slots__ = (
        *("_filter", "_is_on", "_pieces", "_size"),
        *("call", "group", "headers", "key", "media_type", "vector"),
    )

    def __init__(
        self, semantic_cache: SemanticCache, call: Call, key: str, group: str, vector: Vector
    ) -> None:
        self._filter = semantic_cache
        self.call = call
        self.key = key
        self.group = group
        self.vector = vector
        self.headers: Headers
        self.media_type = ""
        self._is_on = False
        self._pieces: list[bytes] = []
        self._size = 0

    def begin(self, reply: Reply) -> None:
        body = reply.body
        is_long = body.length is not None and body.length > self._filter.config.max_entry_bytes
        if reply.status != 200 or is_long or body.encoding not in ("", "identity"):
            return
        self._is_on = True
        self.headers = reply.headers.copy()
        self.media_type = body.media_type
        body.tap_bytes(self._see)

    def _see(self, data: bytes) -> None:
        if not self._is_on:
            return
        size, room = len(data), self._filter._room
        if self._size + size > self._filter.config.max_entry_bytes or size > room.left:
            self._stop()
            return
        self._pieces.append(data)
        self._size += size
        room.left -= size

    def _stop(self) -> None:
        self._is_on = False
        self._pieces.clear()
        self._filter._room.left += self._size
        self._size = 0

    def ended(self, end: End) -> None:
        """A debt of the call."""
        if self._is_on:
            data = b"".join(self._pieces)
            self._stop()
            if end.outcome is COMPLETED:
                self._filter.keep(self, data)


class Answers:
    """The answers of this process, by what their questions mean."""

    def __init__(self, index: VectorIndex[Entry], metrics: Metrics) -> None:
        self.index = index
        self._entries = metrics.gauge(
            "llm_sidecar_semantic_cache_entries", "Answers that are kept."
        ).child()
        self._bytes = metrics.gauge(
            "llm_sidecar_semantic_cache_bytes", "What they take, embeddings included."
        ).child()
        self._evicted = metrics.counter(
            "llm_sidecar_semantic_cache_evictions",
            "Answers that had to go before their time.",
        ).child()

    def put(
        self, key: str, group: str, vector: Vector, entry: Entry, due: float, now: float
    ) -> None:
        evicted = self.index.put(key, group, vector, entry, size_of(entry), due, now)
        self._evicted.value += evicted
        self._say()

    async def purge(
        self, *, key: str | None = None, team: str | None = None, model: str | None = None
    ) -> int | None:
        purged = await purge(self.index, key, team, model)
        self._say()
        return purged

    def close(self) -> None:
        """For the kit's resources, whose it is."""
        self.index.clear()
        self._say()

    def _say(self) -> None:
        self._entries.value = len(self.index)
        self._bytes.value = self.index.bytes

    def holds(self) -> tuple[int, int]:
        """Entries and bytes."""
        return len(self.index), self.index.bytes

    def __repr__(self) -> str:
        return f"<SemanticCache entries={len(self.index)} bytes={self.index.bytes}>"


def _entry_key(group: str, text: str) -> str:
    """40 hex digits: the same question again takes the place of its older answer."""
    return blake2b(f"{group}\n{text}".encode(), digest_size=20).hexdigest()
