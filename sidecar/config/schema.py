"""The configuration as data: strict types, with every default and unit beside its field.

Nothing here does I/O. Files, secrets and positions are `load.py`'s; what the parts mean together
(does this upstream exist, is that chain in order) is `check.py`'s.
"""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
)

from sidecar.config.references import References
from sidecar.config.secret import Secret, TeamKey


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError('write a name of letters, digits, ".", "_" and "-", up to 100')
    return value


Kebab = Annotated[str, AfterValidator(_name)]
"""A name that is safe in a path, a label and a log line."""


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused, values are never coerced or changed."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


def _address(value: str) -> str:
    if value.startswith("unix:"):
        if not value[5:].startswith("/"):
            raise ValueError('write an absolute path, such as "unix:/run/llm.sock"')
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError('write "host:port" or "unix:/path", such as "127.0.0.1:8080"')
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError('write an IPv6 address in brackets, such as "[::1]:8080"')
    return value


Address = Annotated[str, AfterValidator(_address)]


class HttpSettings(Settings):
    """What the data port accepts."""

    max_head_bytes: PositiveInt = 32 * 1024
    """Request line and headers together."""
    max_body_bytes: PositiveInt = 32 * 1024 * 1024
    """A request body that is held: JSON. Larger ones are answered 413."""
    max_upload_bytes: PositiveInt = 512 * 1024 * 1024
    """A request body that streams through: audio, files."""
    body_silence_s: PositiveFloat = 30.0
    """Silence while a request's head or body is still coming."""
    keepalive_s: PositiveFloat = 75.0
    """An idle client connection is kept that long."""
    allowed_origins: list[str] = []
    """Web origins, such as `http://localhost:3000`, whose pages may call although no key is asked
    for. A browser tells the origin; without this any page could spend the provider's key."""
    heartbeat_s: float = Field(default=0.0, ge=0.0)
    """Send the SSE comment `: keep-alive` after that much silence of a stream; 0: never. Once
    one was sent before the first byte, the status is 200 and a later failure is an error event."""


class LogSettings(Settings):
    """Where log lines go."""

    access: str = "stdout"
    """`stdout`, `stderr`, `off`, or a file's path: one JSON line a call."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What our own log tells, on stderr."""


class TimeoutSettings(Settings):
    """What an attempt may wait for."""

    connect_s: PositiveFloat = 5.0
    """Name, free connection, TCP, proxy and TLS together."""
    first_byte_s: PositiveFloat = 120.0
    """From the request written to the first byte of the answer's body."""
    silence_s: PositiveFloat = 60.0
    """Between two reads of the answer."""
    total_s: PositiveFloat = 3600.0
    """The whole attempt."""


class PoolSettings(Settings):
    """Connections to one upstream."""

    max_connections: PositiveInt = 100
    """Open at the same time; one more call waits, at most `connect_s`."""
    idle_s: PositiveFloat = 30.0
    """An unused connection is closed after that."""
    dns_ttl_s: PositiveFloat = 30.0
    """A looked-up address is used that long; when a new look-up fails, longer."""


def _existing_file(value: str, info: ValidationInfo) -> str:
    return info.context.file(value) if isinstance(info.context, References) else value


LocalFile = Annotated[str, AfterValidator(_existing_file)]
"""A path, relative to the file it stands in; absolute, and a file's, once it is loaded."""


class TlsSettings(Settings):
    """TLS towards one upstream. Certificates are verified unless told otherwise in these words."""

    ca_file: LocalFile | None = None
    """PEM bundle to trust instead of the system's."""
    cert_file: LocalFile | None = None
    """PEM client certificate (chain)."""
    key_file: LocalFile | None = None
    """Its private key; None: inside `cert_file`."""
    server_name: str | None = None
    """The name to verify instead of the host of `base_url`."""
    insecure_skip_verify: bool = False
    """Verify nothing; logs a warning at each start."""


def _base_url(value: str) -> str:
    if value == "mock:" or re.fullmatch(r"unix:/[^:?#\s]+(:/[^?#\s]*)?", value):
        return value
    if not re.fullmatch(r"https?://[^/?#\s@]+(/[^?#\s]*)?", value):
        raise ValueError(
            'write "https://host[:port][/path]", "unix:/path.sock[:/path]" or "mock:"; '
            "without user, query or fragment"
        )
    return value


_HOST_AND_PORT = r"(\[[0-9A-Fa-f:.]+\]|[^\s/@:?#\[\]]+)(:\d+)?"


def _proxy(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, Secret) or value in ("env", "none"):
        return value
    how_to = 'write "env", "none", "http://host:port", env:NAME or file:PATH'
    if not isinstance(value, str):
        raise ValueError(how_to)
    if value.startswith(("env:", "file:")) and isinstance(info.context, References):
        secret = Secret.refer(value, info.context)
        is_url = re.fullmatch(rf"http://([^\s/@]+@)?{_HOST_AND_PORT}/?", secret.reveal())
        if not is_url and info.context.is_value(secret.reveal()):
            raise ValueError(f"{value} must hold http://[user:password@]host:port")
        return secret
    if "@" in value:
        raise ValueError(
            "a password never stands in the file: put the whole URL behind env:NAME or file:PATH"
        )
    if not re.fullmatch(rf"http://{_HOST_AND_PORT}/?", value):
        raise ValueError(how_to)
    return Secret(value, value)


def _network(value: str) -> str:
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        network = None
    if network is None or "%" in value:
        raise ValueError('write an address or a network, such as "169.254.1.5" or "fe80::/64"')
    if "/" in value and ip_address(value.partition("/")[0]) != network.network_address:
        raise ValueError(f'{value} has bits set after its prefix: write "{network}"')
    return value


class UpstreamSettings(Settings):
    """One provider. Further keys are the sections of attempt filters, such as `sign`."""

    model_config = ConfigDict(extra="allow")

    dialect: Literal["openai", "anthropic", "dashscope", "qianfan"]
    """What it speaks."""
    base_url: Annotated[str, AfterValidator(_base_url)]
    """What its SDK would be given: with `/v1` for OpenAI-like providers, without for Anthropic;
    with or without `/api/v1` for DashScope, up to `/rpc` for Qianfan. `unix:/path.sock:/v1` for a
    unix socket, `mock:` for the embedded provider."""
    timeouts: TimeoutSettings = TimeoutSettings()
    pool: PoolSettings = PoolSettings()
    tls: TlsSettings = TlsSettings()
    proxy: Annotated[Secret | Literal["env", "none"], PlainValidator(_proxy)] = "env"
    """Proxy for CONNECT: `http://host:port`, or `env:NAME` or `file:PATH` that holds
    `http://[user:password@]host:port`; `env`: from HTTPS_PROXY and NO_PROXY."""
    allow_addresses: list[Annotated[str, AfterValidator(_network)]] = []
    """Addresses or networks (CIDR) that may be connected to although they are link-local or a
    cloud's metadata service, which no upstream or proxy may be otherwise."""
    headers: dict[str, str] = {}
    """Added to every request to this upstream."""
    pass_client_key: bool = False
    """Send on the key that the client came with (`Authorization`, `x-api-key`, `api-key`,
    `x-goog-api-key`), unless it is a team's; excludes `sign`."""
    wait_for: Literal["byte", "event"] = "byte"
    """`event`: a 200 counts as begun only when its first event is no error."""


class TargetSettings(Settings):
    """One place where a model can be had."""

    upstream: Kebab
    model: str | None = None
    """The model's name there; None: the name the caller used."""


def _targets(value: Any) -> Any:
    """`[openai]` is short for `[{upstream: openai}]`."""
    if isinstance(value, list):
        return [{"upstream": item} if isinstance(item, str) else item for item in value]
    return value


class ModelSettings(Settings):
    """A public model name. `gpt-4o: [openai]` is short for `gpt-4o: {targets: [openai]}`."""

    targets: Annotated[list[TargetSettings], BeforeValidator(_targets), Field(min_length=1)]
    """The first is used; further ones are for filters that choose."""


def _model(value: Any) -> Any:
    return {"targets": value} if isinstance(value, list) else value


def _filter_use(value: str) -> str:
    if ":" not in value:
        return _name(value)
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError('write a filter\'s name or "module:Class"')
    return value


FilterUse = Annotated[str, AfterValidator(_filter_use)]
"""A filter's name, or `module:Class`."""


class ChainSettings(Settings):
    """The filters of a call, in the order in which they run."""

    call: list[FilterUse] = [
        *("request_id", "metrics", "access_log", "ledger", "rate_limit", "token_budget", "cost"),
        *("budget", "token_counter", "cache", "priority_queue", "retry"),
    ]
    attempt: list[FilterUse] = ["circuit_breaker", "timeout", "upstream_limits", "sign"]


class TeamSettings(Settings):
    """One team's policy file."""

    team: Kebab
    keys: list[TeamKey] = []
    """`sha256:HEX`, `file:PATH` or `env:NAME`: what its clients send as API key."""
    models: list[str] = ["*"]
    """The models it may use; `*` and `?` stand for any characters."""
    upstreams: list[Kebab] = []
    """The upstreams it may reach directly, by `/{upstream}/…`. No model check applies there."""
    priority: Literal["high", "normal", "low"] = "normal"
    chain: Kebab = "default"
    """Which of `chains` its calls take."""
    filters: dict[str, dict[str, Any]] = {}
    """Settings of filters, over those of `config.yaml`."""


def _store_url(value: Any, info: ValidationInfo) -> Secret | None:
    if value is None or isinstance(value, Secret):
        return value
    if value == "memory":
        return None
    how_to = (
        'write "memory", "redis://host:port/db", "rediss://host:port/db", "unix:///path.sock", '
        "env:NAME or file:PATH"
    )
    if not isinstance(value, str):
        raise ValueError(how_to)
    if value.startswith(("env:", "file:")) and isinstance(info.context, References):
        secret = Secret.refer(value, info.context)
        is_url = _STORE_URL.fullmatch(secret.reveal())
        if not is_url and info.context.is_value(secret.reveal()):
            raise ValueError(f"{value} must hold redis://[user:password@]host[:port][/db]")
        return secret
    if "@" in value:
        raise ValueError(
            "a password never stands in the file: put the whole URL behind env:NAME or file:PATH"
        )
    if not _STORE_URL.fullmatch(value):
        raise ValueError(how_to)
    return Secret(value, value)


_STORE_URL = re.compile(
    rf"rediss?://([^\s/@]*@)?{_HOST_AND_PORT}(/\d{{1,3}})?|unix://([^\s/@]*@)?/[^\s?#]+(\?db=\d{{1,3}})?"
)


class StoreSettings(Settings):
    """State that several processes share. `redis://…` is short for `{url: redis://…}`."""

    url: Annotated[Secret | None, PlainValidator(_store_url)] = None
    """A Redis (from 6) or Valkey: `redis://host:port/db`, `rediss://…` (TLS), `unix:///path.sock`;
    with a password behind `env:NAME` or `file:PATH`. null: the memory of each process."""
    prefix: Kebab = "sidecar"
    """Of all keys there; sidecars that share limits have the same."""
    ca_file: LocalFile | None = None
    """PEM bundle to trust instead of the system's, for `rediss://`."""


def _directory(value: str | None, info: ValidationInfo) -> str | None:
    if value is None or not isinstance(info.context, References):
        return value
    if not value.strip() or "\0" in value:
        raise ValueError('write a path, such as ".sidecar" or "/var/lib/sidecar"')
    return str((info.context.directory / Path(value).expanduser()).absolute())


def _store(value: Any) -> Any:
    if value == "memory":
        return {}
    return {"url": value} if isinstance(value, str) else value


class Config(Settings):
    """One `config.yaml`."""

    listen: Address = "127.0.0.1:8080"
    """The data port: `host:port` or `unix:/path`."""
    admin: Address | None = "127.0.0.1:9090"
    """Health, metrics and state; never the data port. null: none."""
    workers: PositiveInt = 1
    """Processes that share the data port."""
    drain_s: float = Field(default=25.0, ge=0.0)
    """At shutdown, running calls may go on for so long."""
    store: Annotated[StoreSettings, BeforeValidator(_store)] = StoreSettings()
    """Where limits, budgets and circuits live: `memory`, or `redis://host:port/db`, which several
    processes share."""
    data_dir: Annotated[str | None, AfterValidator(_directory)] = None
    """Where local state is kept (what calls used, budgets, a cache on disk), relative to this
    file; made when it is not there. null: nothing is written to disk."""
    allow_anyone: bool = False
    """Serve callers without a team key although the data port is not a loopback address."""
    team: Kebab | None = None
    """Every call is this team's, whatever key it carries: for a sidecar beside one application."""
    teams: str | None = None
    """Team files: a path or glob, relative to this file."""
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    upstreams: Annotated[dict[Kebab, UpstreamSettings], Field(min_length=1)]
    models: dict[str, Annotated[ModelSettings, BeforeValidator(_model)]] = {}
    filters: dict[str, dict[str, Any]] = {}
    """Settings of filters by name, for every chain and team."""
    chains: dict[Kebab, ChainSettings] = {"default": ChainSettings()}
