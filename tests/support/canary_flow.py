"""A sidecar with a canary wherever a secret may stand, and all that it shows to anybody.

`Setting` writes the configuration, `Client` calls, `sinks_of` gathers what is to be searched.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import orjson
import yaml
from pydantic import BaseModel

from filters.signers import find
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    FilterConfig,
    Reply,
    Secret,
)
from sidecar.log import JsonFormatter
from tests.support.canary import Canaries, objects_of
from tests.support.flow import CHAT, Flow, Start, chat_body, request

OPTIONS: dict[str, dict[str, Any]] = {
    "basic": {"username": "somebody"},
    "ACS3-HMAC-SHA256": {"action": "Chat", "version": "2023-12-29"},
    "TC3-HMAC-SHA256": {"service": "hunyuan", "action": "Chat", "version": "2023-09-01"},
    "volcengine-HMAC-SHA256": {"region": "cn-beijing", "service": "ark"},
    "volcengine-ark": {"resource_ids": ["ep-1"]},
    "AWS4-HMAC-SHA256": {"region": "us-east-1"},
}
"""What a scheme cannot do without, beside its secrets."""


# What is written and who calls


class Setting:
    """A configuration with a canary wherever a secret may stand."""

    def __init__(self, folder: Path, canaries: Canaries) -> None:
        self.canaries = canaries
        self.environ: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.upstreams: dict[str, dict[str, Any]] = {}
        self._provider = f"unix:{folder}/provider.sock:/v1"

    def env(self, name: str, value: str | None = None) -> str:
        """A reference to a new canary in the environment."""
        variable = f"CANARY_{len(self.environ)}"
        self.environ[variable] = self.canaries.make(name) if value is None else value
        return f"env:{variable}"

    def file(self, name: str, value: str | None = None) -> str:
        """A reference to a new canary in a file."""
        path = f"secrets/canary-{len(self.files)}"
        self.files[path] = (self.canaries.make(name) if value is None else value) + "\n"
        return f"file:{path}"

    def upstream(self, name: str, sign: Any = None, **more: Any) -> None:
        self.upstreams[name] = {"dialect": "openai", "base_url": self._provider, **more}
        if sign is not None:
            self.upstreams[name]["sign"] = sign

    def bearer(self, name: str, **more: Any) -> None:
        """An upstream with a key of its own."""
        self.upstream(name, {"scheme": "bearer", "key": self.env(f"key of {name}")}, **more)

    def keys(self, scheme: str, owner: str, refer: Callable[..., str]) -> dict[str, str]:
        """References to a canary for every secret of `scheme`."""
        found = {}
        for each in find(scheme).Credentials.model_fields:
            name = f"{each} of {owner}"
            if scheme == "zhipu-jwt-hs256":  # id.secret
                parts = [self.canaries.make(f"{name}, {part}") for part in ("id", "secret")]
                found[each] = refer(name, ".".join(parts))
            else:
                found[each] = refer(name)
        return found

    def signed(self, name: str, scheme: str, token_url: str, **options: Any) -> None:
        """`name` with one set of secrets, and `name-pool` with two."""
        settings: dict[str, Any] = {"scheme": scheme, **OPTIONS.get(scheme, {}), **options}
        if find(scheme).exchange is not None:
            settings["token_url"] = token_url
        self.upstream(name, {**settings, **self.keys(scheme, name, self.env)})
        pool = [self.keys(scheme, f"{name}-pool, {number}", self.file) for number in (1, 2)]
        self.upstream(f"{name}-pool", {**settings, "pool": pool})

    def yaml(self, more: str = "") -> str:
        """All of it as text, with `more` in place of its sections; writes the team's file, too."""
        config = {
            "admin": "127.0.0.1:0",
            "teams": "teams/*.yaml",
            "upstreams": self.upstreams,
            "models": {name: [name] for name in self.upstreams},
            "filters": {f"{__name__}:Shows": {"token": self.env("token of a filter")}},
            "chains": {
                "default": {
                    "call": ["request_id", "metrics", "access_log", f"{__name__}:Shows"],
                    "attempt": [f"{__name__}:Fails", "sign"],
                }
            },
            **(yaml.safe_load(more) or {}),
        }
        team = {
            "team": "search",
            "keys": [self.env("key of the team"), self.file("other key of the team")],
            "upstreams": list(self.upstreams),
        }
        self.files["teams/search.yaml"] = yaml.safe_dump(team).replace("file:", "file:../")
        return yaml.safe_dump(config)

    async def start(self, start: Start, more: str = "") -> Flow:
        """The sidecar, which logs at DEBUG and may log tracebacks."""
        flow: Flow = await start(self.yaml(more), files=self.files, environ=self.environ)
        flow.may_log_errors = True
        logging.getLogger("sidecar").setLevel(logging.DEBUG)  # put back when it has stopped
        return flow


class Client:
    """Calls with every kind of credential that a client may send."""

    def __init__(self, flow: Flow, canaries: Canaries, told: Told) -> None:
        self.flow = flow
        self.told = told
        names = ("x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization")
        self.fields = {name: canaries.make(f"client's {name}") for name in names}
        self.fields["authorization"] = f"Bearer {canaries['key of the team']}"
        self.query = "key=" + quote(canaries.make("client's query"))

    async def post(self, model: str, *, path: str = CHAT, stream: bool = False, **how: str) -> str:
        """One call; `how` are headers, with `_` for `-`. What the client was told."""
        fields = self.fields | {name.replace("_", "-"): value for name, value in how.items()}
        body = chat_body(model, stream=stream)
        return await self.send(request("POST", f"{path}?{self.query}", body, fields))

    async def send(self, data: bytes) -> str:
        """The same for a request as bytes."""
        answer = await self.flow.call(data)
        code = answer.header("x-sidecar-error") or ""
        self.told.codes.append(f"{answer.status} {code}".strip())
        self.told.texts.append(f"{answer.headers!r} {answer.trailers!r} {answer.body!r}")
        return self.told.codes[-1]


def names_found(canaries: Canaries, flow: Flow) -> set[str]:
    """The secrets that reached the provider in a head or target."""
    return {
        name
        for each in flow.provider.books.requests
        for name in canaries.found_in(f"{each.query} {each.headers!r}")
    }


# Filters that show what they can


class Shows(CallFilter):
    """Logs and tells all it knows of a call in the way of a filter that is being debugged."""

    class Config(FilterConfig):
        token: Secret

    async def handle(self, call: Call, call_next: CallNext) -> Reply:
        seen = f"{call!r} {call.team!r} {call.targets!r} {self.config!r} {self.kit.upstreams!r}"
        self.kit.log.debug("call_shown", extra={"seen": seen, "call": call, "mine": self.config})
        reply = await call_next(call)
        self.kit.log.debug("reply_shown", extra={"seen": f"{reply!r} {reply.headers!r}"})
        return reply


class Fails(AttemptFilter):
    """Has a bug when the request asks for one, with the attempt in its hands."""

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        when = attempt.headers.get("x-test-fail")
        if when == "before":
            raise RuntimeError(self._shown(attempt))
        reply = await call_next(attempt)
        if when == "after":  # it holds the upstream's key now
            raise RuntimeError(self._shown(attempt))
        self.kit.log.debug("attempt_shown", extra={"seen": self._shown(attempt), "at": attempt})
        return reply

    def _shown(self, attempt: Attempt) -> str:
        return f"{attempt!r} {attempt.headers!r} {attempt.target!r} {attempt.upstream!r}"


class Leaks(AttemptFilter):
    """Does all that must not be done, so that the search has something to find."""

    async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
        reply = await call_next(attempt)
        key = attempt.headers["authorization"].removeprefix("Bearer ")
        client_key = attempt.call.headers["x-api-key"]
        self.kit.log.debug("leak", extra={"headers": attempt.headers.items()})
        self.kit.access_log({"event": "leak", "url": f"/?key={quote(client_key)}"})
        self.kit.metrics.counter("leaks", "Leaks.", ("key",)).child(key[:12]).inc()
        attempt.call.set_reply_header("x-leak", key)
        self.kit.resources.get("leak", lambda: Leak(key))
        return reply


@dataclass
class Leak:
    """Shows what it holds."""

    key: str


LEAKS = f"{__name__}:Leaks"


# What is looked into


class Records(logging.Handler):
    """Everything that anybody logs: as our formatter writes it, and as the record holds it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.raw: list[str] = []
        self.events: set[str] = set()
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.raw.append(repr(vars(record)))
        self.events.add(record.getMessage())


@contextmanager
def recording() -> Iterator[Records]:
    """Everything that is logged inside, at any level."""
    handler = Records()
    loggers = [logging.getLogger(name) for name in ("", "filters", "asyncio", "aiohttp")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.DEBUG)
    loggers[0].addHandler(handler)
    try:
        yield handler
    finally:
        loggers[0].removeHandler(handler)
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@dataclass
class Told:
    """What clients were told."""

    codes: list[str] = field(default_factory=list)
    """`STATUS CODE` of each answer, the code as the sidecar gives it."""
    texts: list[str] = field(default_factory=list)


async def sinks_of(flow: Flow, records: Records, told: Told) -> dict[str, str | bytes]:
    """All that the sidecar shows to anybody, by where."""
    await flow.quiet()
    await flow.logged(len(told.codes))
    server, bound = flow.server, flow.server.snapshot.bound
    sinks: dict[str, str | bytes] = {
        "access log": flow.log_path.read_bytes(),
        "log lines": "\n".join(records.lines),
        "log records": "\n".join(records.raw),
        "answers": "\n".join(told.texts),
        "resources": repr([*server._resources._made, *server._resources._users]),
        "bound": f"{bound!r} {bound}",
    }
    async with aiohttp.ClientSession(f"http://{server.admin_address}") as session:
        for path in ("/config", "/metrics", "/metrics.json", "/readyz", "/nothing"):
            async with session.get(path) as answer:
                sinks[path] = f"{answer.headers!r} {await answer.text()}"
    for each in objects_of(server, ("sidecar", "filters", "tests")):
        name = type(each).__name__
        sinks[f"repr of {name}"] = str(sinks.get(f"repr of {name}", "")) + f"\n{each!r} {each!s}"
    for owner, models in settings_of(flow).items():
        sinks[f"JSON of {owner}"] = "\n".join(each.model_dump_json() for each in models)
        sinks[f"dump of {owner}"] = repr([each.model_dump() for each in models])
        sinks[f"other JSON of {owner}"] = orjson.dumps(
            [each.model_dump() for each in models], default=str
        )
        sinks[f"pickle of {owner}"] = b"\n".join([pickled(each) for each in models])
    return sinks


def pickled(model: BaseModel) -> bytes:
    """`model` as a pickle, and its values as one: classes that are made at load have none."""
    try:
        whole = pickle.dumps(model)
    except pickle.PicklingError as error:
        whole = repr(error).encode()
    return whole + pickle.dumps(model.model_dump())


def settings_of(flow: Flow) -> dict[str, list[BaseModel]]:
    """Every settings model, by whose it is."""
    bound = flow.server.snapshot.bound
    return {
        "configuration": [bound.config],
        "teams": list(bound.teams),
        "filters": [spec.config for each in bound.policies for spec in (*each.call, *each.attempt)],
        "sections": [
            section for each in bound.upstream_sections.values() for section in each.values()
        ],
    }


# Who gives tokens


class TokenEndpoint:
    """Gives a token to whoever asks, or fails in the way that the path names."""

    def __init__(self, canaries: Canaries) -> None:
        self.canaries = canaries
        self.token = canaries.make("fetched token")
        self.asked: list[bytes] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.gather(*self._tasks)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        asked = head + (await reader.readexactly(int(length[1])) if length else b"")
        self.asked.append(asked)
        target = asked.split(b" ")[1].decode()
        status, body = self._answer(target.partition("?")[0].strip("/"), asked.decode())
        writer.write(
            b"HTTP/1.1 %d X\r\nlocation: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % (status, target.encode(), len(body))
            + body
        )
        writer.close()

    def _answer(self, mode: str, asked: str) -> tuple[int, bytes]:
        if mode == "error":
            return 500, asked.encode()
        if mode == "garbage":
            return 200, b"\xff" + asked.encode()
        if mode == "told":
            names = sorted(self.canaries.found_in(asked))
            text = f"no such key: {' '.join([self.canaries[name] for name in names])}"
            metadata = {"Error": {"Code": "Unknown", "Message": text}}
            error = {"error": "invalid_client", "error_description": text, "message": text}
            return 401, orjson.dumps({**error, "code": text, "ResponseMetadata": metadata})
        if mode == "redirect":
            return 302, b""
        if mode == "refused":
            return 401, orjson.dumps({"error": {"message": asked}})
        result = {"ApiKey": self.token, "ExpiredTime": int(time.time()) + 86400}
        token = {"access_token": self.token, "expires_in": 86400, "token": self.token}
        expire_time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86400))
        return 200, orjson.dumps({**token, "expireTime": expire_time, "Result": result})
