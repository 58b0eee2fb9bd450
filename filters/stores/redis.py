"""The connection to the Redis or Valkey whose state several processes share.

NEW ──first answer──► UP ──no answer in time, an error──► DOWN ──an answer──► UP

One connection for each process. What is asked in one turn of the loop goes out as one pipeline, in
order, and the answers come back in that order. Nobody waits long: a server that does not answer in
time is DOWN, and from then on whoever asks is told so at once, until a task beside the calls has
had an answer again. What to do meanwhile is the caller's business.

redis-py connects, authenticates, packs and parses. Its pools, retries (ten, with growing pauses)
and timeouts (5 s) are made for other work than a request path, and are not used.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sidecar.api import Counter, Kit, Metrics, Secret

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

log = logging.getLogger(__name__)

ANSWER_S = 0.045
"""So long an answer may take."""
BUSY_S = 0.005
"""Whoever looks at the time so much late knows that the loop was busy, and looks again so much
later: an answer that came meanwhile is read first."""
PROBE_S = 0.25
"""While it is DOWN, it is tried so often."""
CONNECT_S = 1.0
"""So long such a try may take; no call waits for it."""
BEAT_S = 2.0
LEASE_S = 10.0
"""A process says every `BEAT_S` that it lives; what it holds is free when it has not so long."""
MAX_WAITING = 10_000
"""So many commands may wait for their answers before those that nobody waits for are dropped."""

Argument = str | int | bytes
Done = Callable[[Any], None]
"""Called once: with the answer, or with a `StoreDown`."""


class StoreDown(Exception):
    """The store gave no answer in time, or is known to be away."""


class Script:
    """Lua that the server runs at once: nothing happens between its commands."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()

    @staticmethod
    @cache
    def of(*names: str) -> Script:
        """The Lua files of these names beside this module, as one script."""
        here = files("filters.stores")
        return Script("\n".join((here / name).read_text() for name in names))


class State(Enum):
    NEW = "new"  # nothing heard yet; what is asked waits for the first connection
    UP = "up"
    DOWN = "down"  # whoever asks is told so at once


class _Request:
    """A command on its way, and who waits for it."""

    __slots__ = ("args", "done", "due", "in_full", "keys", "script")

    def __init__(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Argument],
        done: Done | None,
        due: float,
    ) -> None:
        self.script = script
        self.keys = keys
        self.args = args
        self.done = done
        self.due = due
        self.in_full = False  # the server has lost the script: it is sent as text


def open_redis(kit: Kit) -> Redis:
    """The connection of this process to the store of the configuration, which must name one; it
    begins to connect. Raises RuntimeError when the package for it is not installed."""
    store = kit.store
    if store.url is None:
        raise ValueError("the configuration names no store")
    url = store.url
    redis = kit.resources.get(
        ("redis", store), lambda: Redis(url, store.prefix, kit.metrics, ca_file=store.ca_file)
    )
    redis.connect_soon()
    return redis


class Redis:
    """Runs scripts on the server, quickly or not at all. See the module's docstring."""

    def __init__(
        self, url: Secret, prefix: str, metrics: Metrics, *, ca_file: str | None = None
    ) -> None:
        self._make_connection, self.address = _connector(url, ca_file)
        self.prefix = prefix
        """What all keys begin with."""
        self.replica = uuid.uuid4().hex[:16]
        """This process, among those that share the store."""
        self.replicas = 0
        """Processes that said lately that they live, as last heard; 0: nothing heard yet."""
        self._state = State.NEW
        self._is_closed = False
        self._outbox: deque[_Request] = deque()
        self._in_flight: deque[_Request | None] = deque()  # None: nobody wants the answer
        self._has_outbox = asyncio.Event()
        self._loaded: set[str] = set()
        self._listeners: list[Callable[[], None]] = []
        self._keeper: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._look_at = 0.0
        self._beats: asyncio.TimerHandle | None = None
        self._has_told_refusal = False
        self._down_at = 0.0
        self._beat_script = Script.of("replicas.lua")
        self._up = metrics.gauge(
            "llm_sidecar_store_up", "Processes whose shared store answers; adds up over workers."
        ).child()
        self._errors = metrics.counter(
            "llm_sidecar_store_errors", "Failures of the shared store, by reason.", ["reason"]
        )
        self._dropped: Counter = metrics.counter(
            "llm_sidecar_store_dropped",
            "Settlements and reports that the shared store did not get, as it was away.",
        ).child()

    @property
    def is_up(self) -> bool:
        return self._state is State.UP

    # Asking

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """The script's answer: int, bytes, None, or a list of them. Raises `StoreDown` within
        50 ms; the script may have run nevertheless, and does also when the caller is cancelled."""
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(answer: Any) -> None:
            if waiter.done():
                return
            if isinstance(answer, StoreDown):
                waiter.set_exception(answer)
            else:
                waiter.set_result(answer)

        self.call(script, keys, args, done)
        return await waiter

    def call(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], done: Done
    ) -> None:
        """Run the script and hand its answer to `done`, or a `StoreDown` within 50 ms. Raises
        `StoreDown`, instead of calling `done`, when that is known now."""
        if self._state is State.DOWN or self._is_closed:
            raise StoreDown(f"{self.address} is away")
        self._enqueue(script, keys, args, done)

    def post(self, script: Script, keys: Sequence[str], args: Sequence[Argument] = ()) -> None:
        """Run the script beside the calls, after all that was asked before. Never raises: while
        the store is away, or there is too much to do, it is dropped and counted."""
        waiting = len(self._outbox) + len(self._in_flight)
        if self._state is State.DOWN or self._is_closed or waiting >= MAX_WAITING:
            self._dropped.inc()
            return
        self._enqueue(script, keys, args, None)

    def on_beat(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the store is there (again), before anything else is asked of it,
        and every `BEAT_S` from then on: to renew leases and to say anew what may have been lost."""
        self._listeners.append(listener)

    def off_beat(self, listener: Callable[[], None]) -> None:
        """Call it no more."""
        self._listeners.remove(listener)

    def count_dropped(self) -> None:
        """Something that was asked by `call`, and whose answer matters little, came to nothing."""
        self._dropped.inc()

    # Connecting

    def connect_soon(self) -> None:
        """Begin to connect, unless that was done before, or no loop runs yet: then the first who
        asks begins."""
        if self._keeper is not None or self._is_closed:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._keeper = loop.create_task(self._keep(), name="store")

    async def close(self) -> None:
        """Say goodbye, so that the others need not wait for our lease to end, and let go."""
        if self._state is State.UP and not self._is_closed:
            try:
                await self.run(self._beat_script, [f"{self.prefix}:replicas"], [self.replica, 0])
            except StoreDown:
                pass  # then they wait
        self._is_closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        self._fail_all()
        if self._state is State.UP:
            self._up.dec()
            self._state = State.DOWN

    async def _keep(self) -> None:
        """Have a connection, again and again."""
        connection = self._make_connection()
        try:
            while True:
                try:
                    async with asyncio.timeout(CONNECT_S):
                        await connection.connect()  # type: ignore[no-untyped-call]
                        await self._say_hello(connection)
                    await self._use(connection)
                except Exception as error:
                    self._lost(_reason(error))
                await _disconnect(connection)
                await asyncio.sleep(PROBE_S)
        finally:
            await _disconnect(connection)

    async def _say_hello(self, connection: AbstractConnection) -> None:
        """The first beat: a server that cannot be written to is none."""
        await connection.send_command(
            "EVAL", self._beat_script.text, 1, f"{self.prefix}:replicas", *self._beat_args()
        )
        self.replicas = int(await connection.read_response())

    async def _use(self, connection: AbstractConnection) -> None:
        """Send and read until the connection is lost; raises why, if it was not `_lost`."""
        self._found()
        loop = asyncio.get_running_loop()
        tasks = (
            loop.create_task(self._read(connection), name="store: read"),
            loop.create_task(self._send(connection), name="store: send"),
        )
        self._serving = tasks[0]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._serving = None
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                if _reason(end) == "other":
                    log.error("store_failed", exc_info=end)  # a mistake of ours
                raise end

    def _found(self) -> None:
        loop = asyncio.get_running_loop()
        away_s = round(loop.time() - self._down_at, 1) if self._state is State.DOWN else 0.0
        log.info("store_up", extra={"store": self.address, "away_s": away_s})
        self._state = State.UP
        self._up.inc()
        self._loaded.clear()
        self._has_told_refusal = False
        # What listeners have to say comes before what waited for the first connection.
        waiting, self._outbox = self._outbox, deque()
        self._tell()
        self._outbox.extend(waiting)
        self._beats = loop.call_later(BEAT_S, self._beat)

    def _lost(self, reason: str) -> None:
        """It is DOWN, if it was not already: nobody waits for it any more."""
        if self._state is State.DOWN:
            return
        if self._state is State.UP:
            self._up.dec()
        self._state = State.DOWN
        self._down_at = asyncio.get_running_loop().time()
        self._errors.child(reason).inc()
        log.warning("store_down", extra={"store": self.address, "reason": reason})
        if self._serving is not None:
            self._serving.cancel()
        self._fail_all()

    def _fail_all(self) -> None:
        for timer in (self._watch, self._beats):
            if timer is not None:
                timer.cancel()
        self._watch = self._beats = None
        requests = [each for each in (*self._in_flight, *self._outbox) if each is not None]
        self._in_flight.clear()
        self._outbox.clear()
        for request in requests:
            self._fail(request)

    def _fail(self, request: _Request) -> None:
        if request.done is None:
            self._dropped.inc()
        else:
            request.done(StoreDown(f"{self.address} does not answer"))

    # Sending and reading

    def _enqueue(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], done: Done | None
    ) -> None:
        loop = asyncio.get_running_loop()
        self._outbox.append(_Request(script, keys, args, done, loop.time() + ANSWER_S))
        self._has_outbox.set()
        if self._watch is None:
            self._look_later(ANSWER_S)
        self.connect_soon()

    async def _send(self, connection: AbstractConnection) -> None:
        while True:
            if not self._outbox:
                self._has_outbox.clear()
                await self._has_outbox.wait()
            commands: list[tuple[Argument, ...]] = []
            while self._outbox:
                request = self._outbox.popleft()
                script = request.script
                if request.in_full:
                    command, text = "EVAL", script.text
                else:
                    command, text = "EVALSHA", script.sha
                    if script.sha not in self._loaded:
                        self._loaded.add(script.sha)
                        commands.append(("SCRIPT LOAD", script.text))
                        self._in_flight.append(None)
                commands.append((command, text, len(request.keys), *request.keys, *request.args))
                self._in_flight.append(request)
            await connection.send_packed_command(
                connection.pack_commands(commands), check_health=False
            )

    async def _read(self, connection: AbstractConnection) -> None:
        from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

        while True:
            try:
                answer = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            except NoScriptError:
                self._again()
            except ReadOnlyError:
                raise  # the server is a replica now: the name may lead to another one
            except ResponseError as error:
                self._refused(error)
            else:
                request = self._in_flight.popleft()
                if request is not None and request.done is not None:
                    request.done(answer)

    def _again(self) -> None:
        """The server has forgotten a script, though it was loaded: whoever asked is served now."""
        request = self._in_flight.popleft()
        if request is not None:
            self._loaded.discard(request.script.sha)
            request.in_full = True
            self._outbox.appendleft(request)
            self._has_outbox.set()

    def _refused(self, error: Exception) -> None:
        """The server is there and does not do it: no memory, no permission, an error of ours."""
        request = self._in_flight.popleft()
        if request is not None:
            self._errors.child("refused").inc()
            if not self._has_told_refusal:  # once for each connection; the counter tells the rest
                self._has_told_refusal = True
                log.warning("store_refused", extra={"store": self.address, "error": str(error)})
            self._fail(request)

    def _look(self) -> None:
        """Whether the oldest command has waited too long."""
        self._watch = None
        oldest = next((each for each in self._in_flight if each is not None), None)
        if oldest is None and self._outbox:
            oldest = self._outbox[0]
        if oldest is None:
            return
        now = asyncio.get_running_loop().time()
        if now - self._look_at > BUSY_S:
            self._look_later(BUSY_S)
        elif now >= oldest.due:
            self._lost("timeout")
        else:
            self._look_later(oldest.due - now)

    def _look_later(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._look_at = loop.time() + delay_s
        self._watch = loop.call_later(delay_s, self._look)

    # Beats

    def _beat(self) -> None:
        self._tell()
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self._beat)
        self._enqueue(
            self._beat_script, [f"{self.prefix}:replicas"], self._beat_args(), self._count
        )

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _beat_args(self) -> list[Argument]:
        return [self.replica, round(LEASE_S * 1e6)]

    def _count(self, answer: Any) -> None:
        if isinstance(answer, int):
            self.replicas = answer

    def __repr__(self) -> str:
        return f"<Redis {self.address} {self._state.name} replicas={self.replicas}>"


def _connector(url: Secret, ca_file: str | None) -> tuple[Callable[[], AbstractConnection], str]:
    """Makes connections that wait for nothing by themselves, as our own clock is over them; and
    the address, as it may be shown."""
    try:
        from redis.asyncio.connection import Connection, parse_url
    except ImportError:
        raise RuntimeError(
            "the store needs the package redis: pip install 'llm-sidecar[redis]'"
        ) from None
    try:
        options: dict[str, Any] = dict(parse_url(url.reveal()))
    except ValueError:
        # Not even its message: it may show a part of the password.
        raise ValueError("store: this is not the URL of a Redis or Valkey") from None
    make = options.pop("connection_class", Connection)
    known = ("host", "port", "path", "db", "username", "password")
    kept = {name: each for name, each in options.items() if name in known}
    scheme = url.reveal().partition(":")[0]
    if "path" in kept:
        address = f"unix://{kept['path']}"
    else:
        host, port = kept.get("host", "localhost"), kept.get("port", 6379)
        address = f"{scheme}://{host}:{port}/{kept.get('db', 0)}"
    if ca_file is not None and scheme == "rediss":
        kept["ssl_ca_certs"] = ca_file
    # RESP2, and nothing said of who we are: no more round trips than needed.
    kept |= {"protocol": 2, "driver_info": None, "socket_timeout": None}
    return lambda: make(**kept, socket_connect_timeout=CONNECT_S), address


async def _disconnect(connection: AbstractConnection) -> None:
    try:
        await connection.disconnect(nowait=True)
    except Exception as error:
        log.debug("store_disconnect_failed", extra={"error": type(error).__name__})


def _reason(error: Exception) -> str:
    """One of a few words; never a text of the server, which may repeat what it was sent."""
    from redis import exceptions

    kinds: tuple[tuple[type[Exception], str], ...] = (
        (exceptions.AuthenticationError, "auth"),
        (exceptions.NoPermissionError, "auth"),
        (exceptions.BusyLoadingError, "loading"),
        (exceptions.ReadOnlyError, "readonly"),
        (exceptions.TimeoutError, "timeout"),
        (TimeoutError, "timeout"),
        (exceptions.ConnectionError, "connection"),
        (OSError, "connection"),
    )
    return next((word for kind, word in kinds if isinstance(error, kind)), "other")
