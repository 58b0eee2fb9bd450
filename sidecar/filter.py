"""The filter contract: two bases, their configuration, and the kit they are built with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from sidecar.call import Attempt, Call, Key, Target
from sidecar.clock import Clock
from sidecar.config.secret import Secret
from sidecar.headers import sendable_name
from sidecar.metrics import Metrics
from sidecar.reply import Reply
from sidecar.resources import Resources
from sidecar.tasks import Tasks

T = TypeVar("T")
P = TypeVar("P", bound="Panel")

HeaderName = Annotated[str, AfterValidator(sendable_name)]
"""A header's name in a filter's settings: one that a message may carry, in lower case."""

CallNext = Callable[[Call], Awaitable[Reply]]
AttemptNext = Callable[[Attempt], Awaitable[Reply]]


class Ground(NamedTuple):
    """What a configuration gives to all of its filters."""

    has_data_dir: bool
    has_store: bool
    dialect_of: Callable[[str], str | None]
    """Of a public model name, the dialect of its first target; None: there is no such model."""


class FilterConfig(BaseModel):
    """Base of every filter's `Config`: strict, frozen, unknown keys refused. Units in the names."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    excludes: ClassVar[frozenset[str]] = frozenset()
    """For an upstream's section: settings of the upstream that must not be on beside it."""

    @classmethod
    def variant(cls, values: Any) -> type[Self]:
        """The class that `values`, as they stand in the file, are settings of: a subclass, when
        one of them decides which others there are."""
        return cls

    def lacks(self, ground: Ground) -> Iterable[tuple[tuple[str | int, ...], str]]:
        """What the rest of the configuration lacks for these settings: the place in them, and how
        to mend it. Checked at load, also where nothing is started."""
        return ()

    def notes(self, base_url: str) -> Sequence[str]:
        """For an upstream's section: what `sidecar check` should tell of it; no mistakes."""
        return ()


class Fetched(NamedTuple):
    """What `Kit.fetch` brought."""

    status: int
    body: bytes
    date: str = ""
    """The answer's `Date` header."""

    def __repr__(self) -> str:
        return f"<Fetched {self.status}>"  # the body may be a secret


class Fetch(Protocol):
    """Fetches a small answer from a configured address, off the path of calls."""

    async def __call__(
        self, upstream: str, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Fetched:
        """The answer, whatever its status, by the proxy of `upstream` and to addresses that it may
        have. Redirects are not followed. Raises `FetchFailed` after 10 s, when nobody answers, or
        for more than 64 KiB; its message holds no URL."""
        ...


class KitResources:
    """State that survives reloads, by key: pools, buckets, circuits, caches."""

    __slots__ = ("_generation", "_resources")

    def __init__(self, resources: Resources, generation: int) -> None:
        self._resources = resources
        self._generation = generation

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The object under `key`, made by whoever asks first, in this snapshot or an earlier one.

        It is closed (`close()`, sync or async, when it has one) once no snapshot asks for it.
        """
        return self._resources.get(key, make, user=self._generation)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where state lives that several processes share."""

    url: Secret | None = None
    """Of a Redis or Valkey; None: in the memory of each process."""
    prefix: str = "sidecar"
    """Of all keys there."""
    ca_file: str | None = None
    """PEM bundle to trust instead of the system's, for TLS."""


PANEL = "panel"
"""The kind of panels among the resources."""


class Panel(Protocol):
    """State that operators see, and may change, on the admin port: `/state/{name}`."""

    async def show(self) -> Any:
        """What there is, as JSON can say it; never a secret."""
        ...

    async def act(self, command: Mapping[str, Any]) -> Any:
        """Do what an operator asks; the answer, as JSON can say it. Raises ValueError, whose
        message tells the operator what is wrong with the command."""
        ...


@dataclass(frozen=True, slots=True)
class Kit:
    """What the core hands a filter when it is built."""

    clock: Clock
    metrics: Metrics
    tasks: Tasks
    log: logging.Logger
    access_log: Callable[[Mapping[str, Any]], None]
    """Writes one JSON line, off the event loop; never blocks, drops and counts what is too much."""
    team: str
    upstreams: Mapping[str, Any]
    """This filter's own section of each upstream (`UpstreamConfig` instances), by upstream name."""
    origins: Mapping[str, tuple[str, str]]
    """`Upstream.scheme` and `.host` of each upstream, by name."""
    places: Mapping[str, str]
    """For each upstream, what stands for its whole address and the headers it is sent: the same
    name may lead elsewhere after a reload."""
    fetch: Fetch
    store: StoreAddress
    data_dir: Path | None
    """Where local state may be kept; None: nothing is written to disk."""
    find_model: Callable[[str], Sequence[Target] | None]
    """The targets of a public model name, with the model's name there; None: there is no such
    model. To be asked from `start` on."""
    workers: int
    """Processes that serve this configuration on this machine."""
    max_connections: int
    """Of this process to all upstreams together: more calls would wait for one."""
    resources: KitResources

    def panel(self, name: str, make: Callable[[], P]) -> P:
        """The panel under `name`, made by whoever asks first; kept as a resource is."""
        return self.resources.get((PANEL, name), make)


class Filter:
    """What both kinds of filters share. `__init__` is pure; I/O belongs in `start`."""

    class Config(FilterConfig):
        """No settings."""

    UpstreamConfig: ClassVar[type[FilterConfig] | None] = None
    """Settings that this filter reads from each upstream, under its own name."""

    gives: ClassVar[frozenset[Key[Any]]] = frozenset()
    """Facts that it puts on the call or attempt: before `call_next`, or by the end."""
    needs: ClassVar[frozenset[Key[Any]]] = frozenset()
    """Facts that a filter before it, or the core, must have given; checked at load."""
    reads: ClassVar[frozenset[Key[Any]]] = frozenset()
    """Facts that some filter of the chain must have left by the call's end; checked at load."""
    taps_events: ClassVar[bool] = False
    """It looks at events, so upstreams are asked for an uncompressed body."""
    reads_beginnings: ClassVar[bool] = False
    """It reads how answers begin (`reply.peeked`), so upstreams are only asked for what it can read
    of what the client accepts: gzip."""
    must_be_last: ClassVar[bool] = False
    """Nothing may stand behind it in its chain; checked at load."""

    is_idle = False
    """Set by a filter whose settings leave it nothing to do: calls go past it, for nothing."""

    def __init__(self, config: Any, kit: Kit) -> None:
        self.config = config
        self.kit = kit

    async def start(self) -> None:
        """Open what the filter needs. An error keeps the configuration from going live."""

    async def stop(self) -> None:
        """Close it. Called once for every `start`, also after a failed one; idempotent."""


class CallFilter(Filter):
    """Runs once for each client call."""

    sees_refused: ClassVar[bool] = False
    """Also runs for calls that the edge refuses (unknown key or model, malformed body), whose
    `call_next` raises. For observers: ids, logs, metrics."""

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        """Answer the call, refuse it (`raise Rejected`), or pass it on (`await call_next(call)`).

        Usually `async def`. One that has nothing to do once the reply is here may be a plain
        function that ends in `return call_next(call)`: a coroutine less.

        `call_next` returns once the upstream's head and first body byte are here. Before that a
        failure is an exception and another try is safe to consider; afterwards nobody retries.
        Replies that are not returned must be discarded. Register debts before `call_next`.
        """
        raise NotImplementedError


class AttemptFilter(Filter):
    """Runs once for each try, knows the upstream, and has its own copy of the head."""

    def handle(self, attempt: Attempt, call_next: AttemptNext) -> Awaitable[Reply]:
        """As `CallFilter.handle`, for one attempt; `attempt.headers` and `.path` may be changed."""
        raise NotImplementedError
