"""No secret shows anywhere: a canary for every kind of secret, and a look into every sink.

Good calls, and calls that fail in each way, at log level DEBUG; then everything that a sidecar
tells is searched: access log, own log with tracebacks, clients' answers, the admin port, and what
its objects say of themselves. What travels on purpose (a key to its upstream) is looked for there.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import ssl
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest
import trustme

from filters.signers import SCHEMES, find
from filters.signers.scheme import Signed, Token, TokenRequest
from sidecar.api import Fetched, Secret
from sidecar.config import load_config
from sidecar.errors import ConfigError
from sidecar.mock import MockProvider
from sidecar.transport.connect import Proxy
from tests.support.canary import Canaries, forms
from tests.support.canary_flow import (
    LEAKS,
    Client,
    Records,
    Setting,
    TokenEndpoint,
    Told,
    names_found,
    recording,
    sinks_of,
)
from tests.support.flow import CHAT, HELLO, Start, request
from tests.support.proxy import ConnectProxy

ON_THE_WIRE = {"header-digest": {"scheme": "iflytek-hmac-sha256", "mode": "header-digest"}}
"""Further upstreams: schemes in another mode, by name."""

FAILURES = ("error", "garbage", "told", "redirect", "refused")
"""What a token endpoint answers, by its path; `away` is one that nobody listens at."""


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def setting(tmp_path: Path, canaries: Canaries) -> Setting:
    return Setting(tmp_path, canaries)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def records() -> Iterator[Records]:
    with recording() as records:
        yield records


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address of this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
async def untrusted() -> AsyncIterator[str]:
    """The address of a TLS server whose certificate nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(closes, "127.0.0.1", 0, ssl=context)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.fixture
async def tokens(canaries: Canaries) -> AsyncIterator[TokenEndpoint]:
    async with TokenEndpoint(canaries) as endpoint:
        yield endpoint


# The search itself


@pytest.mark.parametrize("text", ["{whole}", "a{whole}b", "sk…{end}", "key={start}…"])
def test_the_search_finds_a_secret_and_what_is_left_of_it(canaries: Canaries, text: str) -> None:
    whole = canaries.make("planted")
    shown = text.format(whole=whole, start=whole[:12], end=whole[-12:])
    assert canaries.found_in(shown) == canaries.found_in(shown.encode()) == {"planted"}
    assert canaries.found_in(text.format(whole="other", start="other", end="other")) == set()


def test_the_search_finds_a_secret_in_every_encoding(canaries: Canaries) -> None:
    value = canaries.make("planted")
    shown = [
        quote(value, safe=""),
        value.encode().hex(),
        repr({"key": value}),
        orjson.dumps({"key": value}).decode(),
        *[b64encode(f"{'u' * count}:{value}".encode()).decode() for count in range(3)],
        str(pickle.dumps([value])),
    ]
    assert [text for text in shown if canaries.found_in(f"x {text} y") != {"planted"}] == []


def test_the_search_finds_odd_bytes_as_python_writes_them() -> None:
    assert {"caf\udce9-12345", "caf\\udce9-12345"} <= forms("caf\udce9-12345")


def test_a_sink_that_holds_nothing_fails_the_search(canaries: Canaries) -> None:
    canaries.make("any")
    with pytest.raises(AssertionError, match="nothing was looked at in \\['log'\\]"):
        canaries.leaks({"log": "", "answers": "x"})


async def test_what_leaks_is_found_in_each_sink(
    start: Start, setting: Setting, canaries: Canaries, records: Records, told: Told
) -> None:
    setting.bearer("up")
    chain = f"chains: {{default: {{call: [access_log], attempt: ['{LEAKS}', sign]}}}}\n"
    flow = await setting.start(start, chain + "filters: {}")
    client = Client(flow, canaries, told)
    assert await client.post("up") == "200"
    assert client.flow.provider.books.requests
    await flow.logged(2)
    leaks = canaries.leaks(await sinks_of(flow, records, told))
    key, of_client = "key of up", "client's x-api-key"
    expected = {
        f"access log: {of_client}",
        f"log lines: {key}",
        f"log records: {key}",
        f"answers: {key}",
        f"/metrics: {key}",
        f"/metrics.json: {key}",
        f"repr of Leak: {key}",
    }
    assert set(leaks) == expected


# Good calls


async def test_no_secret_shows_while_all_is_well(
    start: Start,
    setting: Setting,
    canaries: Canaries,
    records: Records,
    told: Told,
    tokens: TokenEndpoint,
) -> None:
    for scheme in SCHEMES:
        setting.signed(scheme, scheme, f"{tokens.url}/good")
    for name, options in ON_THE_WIRE.items():
        setting.signed(name, token_url="", **options)
    setting.upstream("passed", pass_client_key=True)
    flow = await setting.start(start)
    client = Client(flow, canaries, told)
    for name in setting.upstreams:
        for _ in range(2):  # both keys of a pool
            assert await client.post(name, stream=True) == "200"
    # Each upstream was called with its own secrets, so there was something to show.
    found = names_found(canaries, flow)
    for name, settings in setting.upstreams.items():
        sign = settings.get("sign")
        if sign is not None and find(sign["scheme"]).exchange is None:
            for owner in [f"{name}, 1", f"{name}, 2"] if "pool" in sign else [name]:
                assert any(f" of {owner}" in each for each in found), owner
    assert {"fetched token", "client's x-api-key"} <= found
    assert "key of the team" not in found
    exchanged = canaries.found_in(b"\n".join(tokens.asked))
    assert {
        name for name in SCHEMES if any(each.endswith(f" of {name}") for each in exchanged)
    } == {name for name in SCHEMES if find(name).exchange is not None}
    sinks = await sinks_of(flow, records, told)
    assert canaries.leaks(sinks) == []
    # The sinks hold what stands beside the secrets.
    assert {"call_shown", "attempt_shown", "reply_shown"} <= records.events
    assert setting.upstreams["bearer"]["sign"]["key"] in str(sinks["/config"])
    assert 'upstream="bearer-pool"' in str(sinks["/metrics"])
    assert {"repr of SignerKey", "repr of Snapshot", "repr of Secret"} <= sinks.keys()


# Calls that fail


async def test_no_secret_shows_while_upstreams_fail(
    start: Start,
    setting: Setting,
    canaries: Canaries,
    records: Records,
    told: Told,
    nobody: str,
    untrusted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting.bearer("up")
    setting.signed("pooled", "bearer", "")
    setting.bearer("refused", base_url=f"http://{nobody}")
    setting.bearer("unknown", base_url="http://nowhere.test")
    setting.bearer("untrusted", base_url=f"https://{untrusted}", proxy="none")
    setting.bearer("eventful", wait_for="event")
    setting.signed("TC3", "TC3-HMAC-SHA256", "", action=None)
    refuse_names(monkeypatch)
    flow = await setting.start(start)
    client = Client(flow, canaries, told)
    assert [await client.post(name) for name in ("refused", "unknown", "untrusted")] == [
        "502 upstream_unreachable",
        "502 upstream_unresolved",
        "502 upstream_tls_failed",
    ]
    for status in ("401", "403", "429", "500"):
        for name in ("up", "pooled", "pooled", "TC3"):
            told_by = await client.post(name, x_mock_status=status, x_tc_action="Chat")
            assert told_by.startswith(status)
    assert await client.post("up", stream=True, x_mock_die="events:2") == "200"
    assert await client.post("up", x_mock_die="events:1") == "200"
    assert await client.post("up", x_mock_die="head") == "502 upstream_closed"
    assert await client.post("eventful", stream=True, x_mock_error_event="0") == (
        "502 upstream_error_event"
    )
    assert await client.post("up", x_test_fail="before") == "500 internal_error"
    assert await client.post("up", x_test_fail="after") == "500 internal_error"
    sinks = await sinks_of(flow, records, told)
    assert canaries.leaks(sinks) == []
    assert {"call_failed", "key_refused", "attempt_shown"} <= records.events
    assert "Traceback (most recent call last)" in str(sinks["log lines"])


def refuse_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that end in `.test` are known to nobody, and no name server is asked."""
    loop_class = type(asyncio.get_running_loop())
    original = loop_class.getaddrinfo

    async def getaddrinfo(loop: Any, host: str, port: int, **more: Any) -> list[Any]:
        if host.endswith(".test"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown name")
        found: list[Any] = await original(loop, host, port, **more)
        return found

    monkeypatch.setattr(loop_class, "getaddrinfo", getaddrinfo)


async def test_no_secret_shows_while_requests_are_refused(
    start: Start, setting: Setting, canaries: Canaries, records: Records, told: Told
) -> None:
    setting.bearer("up")
    setting.signed("TC3", "TC3-HMAC-SHA256", "", action=None)
    flow = await setting.start(start)
    client = Client(flow, canaries, told)
    assert await client.post("TC3") == "400 cannot_sign"
    assert await client.post("nothing") == "404 model_not_found"
    assert await client.post("up", path="/nowhere") == "404 not_found"
    body = f'{{"model": "up", "api_key": "{canaries.make("secret in a body")}'.encode()
    assert await client.send(request("POST", CHAT, body, client.fields)) == "400 invalid_json"
    assert await client.post("up", expect="the best") == "417 expectation_failed"
    wrong = canaries.make("unknown key")
    assert await client.post("up", authorization=f"Bearer {wrong}") == "401 invalid_api_key"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    line = f"authorization: Bearer {wrong}".encode()
    assert await client.send(head + line + b"\0\r\n\r\n") == "400 bad_request"
    assert await client.send(head + line + b"x" * 70_000 + b"\r\n\r\n") == "431 head_too_large"
    told.codes[-2:] = []  # what cannot be parsed is no call: the access log has no line of it
    assert canaries.leaks(await sinks_of(flow, records, told)) == []


async def test_no_secret_shows_when_an_sdk_leaves(
    start: Start, setting: Setting, canaries: Canaries, records: Records, told: Told
) -> None:
    setting.bearer("up")
    flow = await setting.start(start)
    client = Client(flow, canaries, told)
    fields = {**client.fields, "x-mock-hang": "events:2"}
    async with flow.openai(canaries["key of the team"]) as sdk:
        stream = await sdk.chat.completions.create(
            model="up", messages=HELLO, stream=True, extra_headers=fields
        )
        told.texts.append(repr(await anext(aiter(stream))))
        await stream.close()
        fields["x-mock-hang"] = "head"
        waiting = asyncio.ensure_future(
            sdk.chat.completions.create(model="up", messages=HELLO, extra_headers=fields)
        )
        await flow.provider.wait_for(lambda: len(flow.provider.books.requests) == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    told.codes += ["200", "499"]
    sinks = await sinks_of(flow, records, told)
    assert str(sinks["access log"]).count("client_gone") == 2
    assert canaries.leaks(sinks) == []


@pytest.mark.parametrize("between", ["+", "-"])
async def test_no_secret_shows_while_the_token_endpoint_fails(
    start: Start,
    setting: Setting,
    canaries: Canaries,
    records: Records,
    told: Told,
    tokens: TokenEndpoint,
    nobody: str,
    between: str,
) -> None:
    canaries.between = between
    schemes = [name for name in SCHEMES if find(name).exchange is not None]
    for scheme in schemes:
        for mode in FAILURES:
            setting.signed(f"{scheme}-{mode}", scheme, f"{tokens.url}/{mode}")
        setting.signed(f"{scheme}-away", scheme, f"http://{nobody}/")
        setting.signed(scheme, scheme, f"{tokens.url}/good")
    flow = await setting.start(start)
    client = Client(flow, canaries, told)
    for name in setting.upstreams:
        if name.removesuffix("-pool") not in schemes:
            assert await client.post(name) == "502 upstream_token_failed"
    for scheme in schemes:  # a good token, which the provider refuses at once
        assert (await client.post(scheme, x_mock_status="401")).startswith("401")
        assert await client.post(scheme) == "200"
    sinks = await sinks_of(flow, records, told)
    assert canaries.leaks(sinks) == []
    assert "token_fetch_failed" in records.events
    assert 'llm_sidecar_token_fetches_total{result="failed"' in str(sinks["/metrics"])
    sent = canaries.found_in(b"\n".join(tokens.asked))
    for scheme in schemes:
        assert all(any(f" of {scheme}-{mode}" in each for each in sent) for mode in FAILURES)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({}, "200"),
        ({"refuse_with": 407}, "502 upstream_proxy_refused"),
        ({"answer": b"HTTP/1.1 what?\r\n\r\n"}, "502 upstream_unreachable"),
        (None, "502 upstream_unreachable"),
    ],
)
async def test_no_secret_shows_of_a_proxy(
    start: Start,
    setting: Setting,
    canaries: Canaries,
    records: Records,
    told: Told,
    nobody: str,
    how: dict[str, Any] | None,
    code: str,
) -> None:
    async with ConnectProxy(**(how or {})) as proxy, provider_on_tcp() as far:
        where = nobody if how is None else proxy.address
        for refer in (setting.env, setting.file):
            name = f"by-{refer.__name__}"
            password = canaries.make(f"password {name}")
            url = f"http://user:{quote(password)}@{where}"
            setting.bearer(name, base_url=f"http://{far}/v1", proxy=refer(name, url))
        flow = await setting.start(start)
        client = Client(flow, canaries, told)
        for name in setting.upstreams:
            assert await client.post(name) == code
        sinks = await sinks_of(flow, records, told)
        await flow.server.stop()
    assert canaries.leaks(sinks) == []
    if how is not None:
        shown = canaries.found_in(b"\n".join(proxy.heads))
        assert shown == {"password by-env", "password by-file"}


@asynccontextmanager
async def provider_on_tcp() -> AsyncIterator[str]:
    """The address of a provider: nobody reaches a unix socket through a proxy."""
    provider = MockProvider()
    yield await provider.start()
    await provider.stop()


# Values that hold a secret for a moment


@pytest.mark.parametrize(
    "make",
    [
        lambda secret: Token(secret, 1.0, 2.0),
        lambda secret: TokenRequest(
            "POST", f"http://h/?s={secret}", {"a": secret}, secret.encode()
        ),
        lambda secret: Signed(
            {"Authorization": f"Bearer {secret}"}, f"key={secret}", {"s": secret}
        ),
        lambda secret: Fetched(200, secret.encode()),
        lambda secret: Proxy.parse(f"http://u:{secret}@h:1"),
        lambda secret: Secret(secret, "env:KEY"),
    ],
    ids=["token", "token request", "signature", "fetched answer", "proxy", "secret"],
)
def test_a_value_that_holds_a_secret_does_not_show_it(
    canaries: Canaries, make: Callable[[str], object]
) -> None:
    value = make(canaries.make("held"))
    assert canaries.found_in(f"{value!r} {value!s} {value} {[value]!r}") == set()


# Files that do not load


@pytest.mark.parametrize(
    "line",
    [
        "sign: {{key: {} [",
        "sign: {{key: '{}",
        "sign: {{key: *{}",
        "sign: {{key: !{} x}}",
        "sign: {{key: &a {}, key: {}}}",
        "{}",
        "\x01{}",
    ],
)
def test_a_file_that_is_no_yaml_is_not_shown(tmp_path: Path, canaries: Canaries, line: str) -> None:
    letters = "".join(each for each in canaries.make("in a broken file") if each.isalpha())
    canaries.add("the letters of it", letters)
    path = tmp_path / "config.yaml"
    path.write_text(f"upstreams:\n  up:\n    dialect: openai\n    {line.format(*[letters] * 2)}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, {})
    trace = "".join(traceback.format_exception(raised.value))
    assert canaries.found_in(f"{raised.value} {raised.value.problems!r} {trace}") == set()
