"""The upstream's own credentials on every attempt, and never the client's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from filters.sign import Sign
from filters.signers.settings import SignSettings
from sidecar.api import (
    Attempt,
    AttemptFilter,
    AttemptNext,
    Call,
    CallFilter,
    CallNext,
    Reply,
    Secret,
)
from sidecar.call import Target
from sidecar.config import bind, load_config
from sidecar.errors import ConfigError
from tests.support.harness import FakeUpstream, Harness, Sent, Use

KEY = "sk-upstream"


def signing(scheme: str, name: str | None = None, key: str = KEY) -> Use:
    settings: dict[str, Any] = {"scheme": scheme, "key": Secret(key)}
    if name is not None:
        settings["name"] = name
    return Use(Sign, {}, {"fake": SignSettings.variant(settings).model_validate(settings)})


async def signed(
    use: Use, query: str = "", headers: tuple[tuple[str, str], ...] = (), path: str = ""
) -> Sent:
    """What reaches the upstream."""
    async with Harness(use) as harness:
        call = harness.call(query=query, headers=headers, path=path or "/v1/chat/completions")
        await harness.run(call)
        (sent,) = harness.upstream.sent
        return sent


CLIENTS = (
    ("Authorization", "Bearer client"),
    ("X-Api-Key", "client"),
    ("api-key", "client"),
    ("Cookie", "client"),
    ("x-kept", "1"),
)


async def test_bearer() -> None:
    sent = await signed(signing("bearer"), headers=CLIENTS)
    assert sent.headers == {"x-kept": "1", "authorization": f"Bearer {KEY}"}
    assert sent.path == "/v1/chat/completions"


@pytest.mark.parametrize(("name", "wire"), [(None, "x-api-key"), ("Api-Key", "api-key")])
async def test_header(name: str | None, wire: str) -> None:
    sent = await signed(signing("header", name), headers=CLIENTS)
    assert sent.headers == {"x-kept": "1", wire: KEY}


async def test_header_that_the_client_sends_too_is_replaced() -> None:
    sent = await signed(signing("header", "X-Token"), headers=(("x-token", "a"), ("X-TOKEN", "b")))
    assert sent.headers == {"x-token": KEY}


@pytest.mark.parametrize(
    ("query", "wire"),
    [
        ("", "?key=k%2F%20%26"),
        ("a=1", "?a=1&key=k%2F%20%26"),
        ("a=%2f&b", "?a=%2f&b&key=k%2F%20%26"),
    ],
)
async def test_query(query: str, wire: str) -> None:
    sent = await signed(signing("query", "key", "k/ &"), query=query, headers=CLIENTS)
    assert sent.path == f"/v1/chat/completions{wire}"
    assert sent.headers == {"x-kept": "1"}


@pytest.mark.parametrize(
    ("query", "wire"),
    [
        ("key=client", f"?key={KEY}"),
        ("a=1&key=client&b=2", f"?a=1&b=2&key={KEY}"),
        ("key=client&key=again", f"?key={KEY}"),
        ("k%65y=client", f"?key={KEY}"),
        ("key", f"?key={KEY}"),
        ("keys=1&mykey=2", f"?keys=1&mykey=2&key={KEY}"),
    ],
)
async def test_client_key_in_the_query_is_replaced(query: str, wire: str) -> None:
    sent = await signed(signing("query", "key"), query=query)
    assert sent.path == f"/v1/chat/completions{wire}"


async def test_key_goes_to_its_own_upstream_alone() -> None:
    other = FakeUpstream("other")

    class Both(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            call.target = Target(other)
            return await call_next(call)

    async with Harness(Both, signing("bearer")) as harness:
        await harness.run()
    assert harness.upstream.sent[0].headers == {"authorization": f"Bearer {KEY}"}
    assert other.sent[0].headers == {}


async def test_every_attempt_is_signed() -> None:
    class Twice(CallFilter):
        async def handle(self, call: Call, call_next: CallNext) -> Reply:
            (await call_next(call)).discard()
            return await call_next(call)

    async with Harness(Twice, signing("query", "key")) as harness:
        await harness.run()
    assert [sent.path for sent in harness.upstream.sent] == [f"/v1/chat/completions?key={KEY}"] * 2


async def test_it_signs_what_the_filters_before_it_made() -> None:
    class Changes(AttemptFilter):
        async def handle(self, attempt: Attempt, call_next: AttemptNext) -> Reply:
            attempt.path = "/changed"
            attempt.headers["authorization"] = "Bearer a filter's"
            return await call_next(attempt)

    async with Harness(Changes, signing("bearer")) as harness:
        await harness.run()
    (sent,) = harness.upstream.sent
    assert (sent.path, sent.headers) == ("/changed", {"authorization": f"Bearer {KEY}"})


def test_nothing_may_stand_behind_it() -> None:
    assert Sign.must_be_last


def test_settings_do_not_show_the_key() -> None:
    values = {"scheme": "bearer", "key": Secret(KEY, "env:KEY")}
    settings = SignSettings.variant(values).model_validate(values)
    assert KEY not in f"{settings!r}{settings.model_dump_json()}"


@pytest.mark.parametrize("name", ["", "a b", "x:y", "host", "Content-Length"])
def test_header_that_cannot_be_sent_does_not_load(name: str) -> None:
    with pytest.raises(ValidationError):
        signing("header", name)


@pytest.mark.parametrize("key", ["a\nb", "a\r\nx-b: 1", "a\0"])
def test_key_that_cannot_be_sent_does_not_load_and_is_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII") as raised:
        Harness(signing("bearer", key=key))
    assert key not in str(raised.value)


def test_key_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    path = tmp_path / "config.yaml"
    upstream = 'dialect: openai, base_url: "mock:"'
    path.write_text(
        "upstreams:\n"
        f"  a: {{{upstream}, sign: {{scheme: bearer, key: env:KEY}}}}\n"
        f"  b: {{{upstream}, sign: {{scheme: header, name: Api-Key, key: file:key}}}}\n"
        f"  c: {{{upstream}}}\n"
    )
    environ = {"KEY": "from-env"}
    sections: Any = bind(load_config(path, environ), environ).upstream_sections["sign"]
    found = {name: each.key.reveal() for name, each in sections.items()}
    assert found == {"a": "from-env", "b": "from-file"}
    loaded = load_config(path, {})
    with pytest.raises(ConfigError, match="KEY is not set"):
        bind(loaded, {})
