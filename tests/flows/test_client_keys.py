"""What becomes of the key a client comes with: it is for us, unless an upstream is told to pass it.

What is stripped or passed is read from the very fields that reach the provider.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from sidecar.config import bind, load_config
from sidecar.dispatch import CLIENT_KEYS
from sidecar.errors import ConfigError
from tests.support.canary import Canaries
from tests.support.flow import (
    CHAT,
    MESSAGES,
    PROVIDER_KEY,
    Answer,
    Flow,
    RawClient,
    Start,
    chat_body,
    until,
)
from tests.support.process import finished

Fields = Sequence[tuple[str, str]]

SPELLINGS: dict[str, Fields] = {
    "bearer": [("Authorization", "Bearer {}")],
    "bearer in lower case": [("authorization", "bearer {}")],
    "bearer in upper case": [("AUTHORIZATION", "BEARER {}")],
    "bearer with more space": [("authorization", "  Bearer   {}  ")],
    "basic": [("authorization", "Basic {}")],
    "no scheme": [("authorization", "{}")],
    "x-api-key": [("x-api-key", "{}")],
    "X-Api-Key": [("X-Api-Key", "{}")],
    "X-API-KEY": [("X-API-KEY", "{}")],
    "api-key": [("api-key", "{}")],
    "Api-Key": [("Api-Key", "{}")],
    "x-goog-api-key": [("x-goog-api-key", "{}")],
    "X-Goog-Api-Key": [("X-Goog-Api-Key", "{}")],
    "repeated": [("x-api-key", "{}"), ("X-Api-Key", "{} again"), ("x-api-key", "")],
    "both": [("x-api-key", "{}"), ("authorization", "Bearer {} again")],
    "repeated bearer": [("authorization", "Bearer {}"), ("Authorization", "Bearer {} again")],
    "cookie": [("Cookie", "session={}"), ("cookie", "more={}")],
    "proxy-authorization": [("Proxy-Authorization", "Basic {}")],
    "named by connection": [("connection", "x-api-key"), ("x-api-key", "{}")],
}
NO_KEYS = ("cookie", "proxy-authorization", "named by connection")
KEYS = {name: fields for name, fields in SPELLINGS.items() if name not in NO_KEYS}
"""What an upstream may be told to pass."""


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


def raw_request(
    path: str,
    fields: Fields,
    body: bytes = b"",
    content_type: str = "application/json",
    *,
    method: str = "POST",
) -> bytes:
    """A request with exactly these fields: spelled so, in this order, as often."""
    head = [("Host", "sidecar"), *fields, ("content-length", str(len(body)))]
    if body:
        head.append(("content-type", content_type))
    lines = "".join(f"{name}: {value}\r\n" for name, value in head)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogateescape") + body


def filled(fields: Fields, key: str) -> list[tuple[str, str]]:
    return [(name, value.replace("{}", key)) for name, value in fields]


def received_keys(flow: Flow) -> list[tuple[str, str]]:
    """The credentials that the last request had when it reached the provider."""
    names = {name.decode() for name in CLIENT_KEYS} | {"cookie", "proxy-authorization"}
    received = flow.provider.books.requests[-1]
    return [(name, value) for name, value in received.headers if name.lower() in names]


def received_text(flow: Flow) -> str:
    return repr([(each.query, each.headers) for each in flow.provider.books.requests])


async def told(flow: Flow, answers: Sequence[Answer]) -> str:
    """What the sidecar wrote to its logs and to its clients."""
    await flow.logged(len(answers))
    records = repr([vars(record) for record in flow.records])
    shown = repr([(each.headers, each.body) for each in answers])
    return f"{flow.log_path.read_text()} {records} {shown}"


def paths(upstream: str = "up-openai") -> dict[str, bytes]:
    """Path and body of each way into the upstream; its answer tells nothing of the request."""
    return {CHAT: chat_body("gpt"), f"/{upstream}/chat/completions": chat_body("gpt")}


# Stripped


@pytest.mark.parametrize("fields", SPELLINGS.values(), ids=SPELLINGS)
async def test_the_key_of_a_client_is_stripped_however_it_is_spelled(
    flow: Flow, canaries: Canaries, fields: Fields
) -> None:
    key = canaries.make("client's key")
    answers = [
        await flow.call(raw_request(path, filled(fields, key), body))
        for path, body in paths().items()
    ]
    assert [each.status for each in answers] == [200, 200]
    assert received_keys(flow) == []
    assert canaries.found_in(received_text(flow)) == set()
    assert canaries.found_in(await told(flow, answers)) == set()


async def test_the_key_of_an_upstream_stands_where_the_client_had_its_own(
    start: Start, canaries: Canaries
) -> None:
    flow = await start("upstreams: {up-openai: {sign: {scheme: bearer, key: 'env:PROVIDER_KEY'}}}")
    key = canaries.make("client's key")
    received = {}
    for name, fields in SPELLINGS.items():
        assert (await flow.call(raw_request(CHAT, filled(fields, key), chat_body()))).status == 200
        received[name] = received_keys(flow)
    ours = ("authorization", f"Bearer {PROVIDER_KEY}")
    assert {name: keys for name, keys in received.items() if keys != [ours]} == {}
    assert canaries.found_in(received_text(flow)) == set()


async def test_anthropic_clients_are_stripped_of_both_their_keys(
    flow: Flow, canaries: Canaries
) -> None:
    fields = filled([("x-api-key", "{}"), ("Authorization", "Bearer {}")], canaries.make("key"))
    assert (await flow.call(raw_request(MESSAGES, fields, chat_body("claude")))).status == 200
    assert received_keys(flow) == []


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "POST"])
async def test_the_key_is_stripped_from_whatever_is_passed_through(
    flow: Flow, canaries: Canaries, method: str
) -> None:
    fields = [each for spelling in SPELLINGS.values() for each in spelling]
    fields = filled([each for each in fields if each[0] != "connection"], canaries.make("key"))
    answer = await flow.call(raw_request("/up-openai/files/1", fields, method=method))
    assert answer.status == 200
    assert received_keys(flow) == []
    assert canaries.found_in(answer.body) == set()  # this path tells back what it got


async def test_the_key_is_stripped_from_an_upload(flow: Flow, canaries: Canaries) -> None:
    fields = filled([*SPELLINGS["both"], *SPELLINGS["cookie"]], canaries.make("key"))
    data = b"RIFF" * 10_000
    answer = await flow.call(raw_request("/up-openai/audio", fields, data, "audio/wav"))
    assert answer.json["body_sha256"] == hashlib.sha256(data).hexdigest()
    assert received_keys(flow) == []


# Passed on


def passing(more: str = "") -> str:
    return f"upstreams: {{up-openai: {{pass_client_key: true}}}}\n{more}"


@pytest.mark.parametrize("name", KEYS)
async def test_the_key_of_a_client_is_passed_as_it_came_and_never_logged(
    start: Start, canaries: Canaries, name: str
) -> None:
    flow = await start(passing())
    key = canaries.make("client's key")
    fields = filled(SPELLINGS[name], key)
    answers = [await flow.call(raw_request(path, fields, body)) for path, body in paths().items()]
    assert [each.status for each in answers] == [200, 200]
    # RFC 9110, 5.5: space around a value is not part of it.
    assert received_keys(flow) == [(each.lower(), value.strip()) for each, value in fields]
    assert canaries.found_in(await told(flow, answers)) == set()


async def test_the_key_is_passed_byte_for_byte(start: Start) -> None:
    flow = await start(passing())
    value = "Bearer \udce9\udcff\u00e9 \t~'\"\\%41,;"
    answer = await flow.call(raw_request(CHAT, [("Authorization", value)], chat_body()))
    assert answer.status == 200
    raw = dict(flow.provider.books.requests[0].raw_headers)
    assert raw[b"authorization"] == value.encode("utf-8", "surrogateescape")


async def test_the_key_is_passed_with_an_upload(start: Start, canaries: Canaries) -> None:
    flow = await start(passing())
    fields = filled(SPELLINGS["bearer"], canaries.make("key"))
    data = b"RIFF" * 10_000
    client = await flow.connect()
    await send_in_halves(flow, client, raw_request("/up-openai/audio", fields, data, "audio/wav"))
    assert (await client.answer()).status == 200
    assert received_keys(flow) == [("authorization", f"Bearer {canaries['key']}")]
    await flow.logged()
    assert canaries.found_in(flow.log_path.read_bytes()) == set()


async def send_in_halves(flow: Flow, client: RawClient, data: bytes) -> None:
    """The second half follows once the provider has begun to get the first."""
    client.send(data[: len(data) // 2])
    await until(lambda: flow.provider.arriving)
    client.send(data[len(data) // 2 :])


@pytest.mark.parametrize("name", NO_KEYS)
async def test_what_is_no_key_is_stripped_although_keys_are_passed(
    start: Start, canaries: Canaries, name: str
) -> None:
    flow = await start(passing())
    fields = filled(SPELLINGS[name], canaries.make("no key"))
    assert (await flow.call(raw_request(CHAT, fields, chat_body()))).status == 200
    assert received_keys(flow) == []
    assert canaries.found_in(received_text(flow)) == set()


async def test_the_key_is_passed_to_that_upstream_alone(start: Start, canaries: Canaries) -> None:
    flow = await start(passing())
    key = canaries.make("key")
    fields = filled(SPELLINGS["both"], key)
    for path, model in ((CHAT, "gpt"), (MESSAGES, "claude"), ("/up-anthropic/v1/messages", "x")):
        assert (await flow.call(raw_request(path, fields, chat_body(model)))).status == 200
    by_path = {each.path: json.dumps(each.headers) for each in flow.provider.books.requests}
    assert {path for path, text in by_path.items() if canaries.found_in(text)} == {CHAT}
    assert len(flow.provider.books.requests) == 3


async def test_errors_do_not_tell_the_key_that_is_passed(start: Start, canaries: Canaries) -> None:
    flow = await start(passing())
    fields = filled(SPELLINGS["both"], canaries.make("key"))
    answers = [
        await flow.call(raw_request(CHAT, [*fields, mock], chat_body(stream=True)))
        for mock in (
            ("x-mock-status", "401"),
            ("x-mock-status", "500"),
            ("x-mock-die", "head"),
            ("x-mock-die", "events:1"),
        )
    ]
    assert [each.status for each in answers] == [401, 500, 502, 200]
    assert canaries.found_in(received_text(flow)) == {"key"}
    assert canaries.found_in(await told(flow, answers)) == set()


# A team's key


TEAM = 'team: search\nkeys: ["env:TEAM_KEY", "{digest}"]\nupstreams: [up-openai]\n'


async def start_with_team(start: Start, canaries: Canaries, more: str = "") -> Flow:
    """A sidecar with one team and two keys of it, one of them known by its digest alone."""
    digest = hashlib.sha256(canaries.make("digested key").encode()).hexdigest()
    return await start(
        passing(f"teams: teams/*.yaml\n{more}"),
        files={"teams/search.yaml": TEAM.replace("{digest}", f"sha256:{digest}")},
        environ={"TEAM_KEY": canaries.make("team key")},
    )


OF_TEAMS = {
    name: fields for name, fields in KEYS.items() if name != "basic" and "again" not in str(fields)
}
ODD: dict[str, Fields] = {
    "basic": [("authorization", "Basic {}")],
    "another scheme": [("authorization", "Token {}")],
    "tab": [("authorization", "Bearer\t{}")],
    "bearer elsewhere": [("x-goog-api-key", "Bearer {}")],
    "several headers": [
        ("authorization", "Bearer {} "),
        ("x-api-key", "{}"),
        ("api-key", "Bearer {}"),
    ],
}
"""As no SDK sends it, and a script may."""


@pytest.mark.parametrize("more", ["", "team: search\n"], ids=["team by key", "fixed team"])
@pytest.mark.parametrize("which", ["team key", "digested key"])
@pytest.mark.parametrize("spellings", [OF_TEAMS, ODD], ids=["usual", "odd"])
async def test_a_key_of_a_team_is_never_passed(
    start: Start, canaries: Canaries, spellings: dict[str, Fields], which: str, more: str
) -> None:
    flow = await start_with_team(start, canaries, more)
    passed: dict[str, object] = {}
    answers = []
    for name, fields in spellings.items():
        # Some spellings let nobody in; then the key comes by another header, too.
        sent = filled([*fields, ("api-key", "{}")], canaries[which])
        for path, body in paths().items():
            answers.append(await flow.call(raw_request(path, sent, body)))
            if keys := received_keys(flow):
                passed[name] = keys
    assert {each.status for each in answers} == {200}
    assert passed == {}
    assert canaries.found_in(received_text(flow)) == set()
    assert canaries.found_in(await told(flow, answers)) == set()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("authorization", "Bearer {}"), ("x-api-key", "{}")),
        (("authorization", "Bearer {}"), ("x-goog-api-key", "{}")),
        (("x-api-key", "{}"), ("api-key", "{}")),
        (("api-key", "{}"), ("x-goog-api-key", "{}")),
    ],
)
async def test_beside_the_key_of_a_team_the_key_for_the_provider_is_passed(
    start: Start, canaries: Canaries, ours: tuple[str, str], theirs: tuple[str, str]
) -> None:
    flow = await start_with_team(start, canaries)
    of_provider = canaries.make("provider's key")
    fields = [*filled([ours], canaries["team key"]), *filled([theirs], of_provider)]
    answer = await flow.call(raw_request(CHAT, fields, chat_body()))
    assert answer.status == 200
    assert received_keys(flow) == filled([theirs], of_provider)
    assert canaries.found_in(await told(flow, [answer])) == set()


async def test_with_a_fixed_team_the_client_passes_its_own_key_in_any_header(
    start: Start, canaries: Canaries
) -> None:
    flow = await start_with_team(start, canaries, "team: search\n")
    fields = filled(SPELLINGS["both"], canaries.make("provider's key"))
    assert (await flow.call(raw_request(CHAT, fields, chat_body()))).status == 200
    assert received_keys(flow) == fields


async def test_a_key_that_is_no_longer_the_teams_is_not_known_and_goes_nowhere(
    start: Start, canaries: Canaries
) -> None:
    flow = await start_with_team(start, canaries)
    fields = filled(SPELLINGS["bearer"], canaries.make("old key"))
    answer = await flow.call(raw_request(CHAT, fields, chat_body()))
    assert (answer.status, answer.header("x-sidecar-error")) == (401, "invalid_api_key")
    assert not flow.provider.books.requests
    assert canaries.found_in(await told(flow, [answer])) == set()


# What does not load, and what is said of it


BOTH = """\
upstreams:
  up:
    dialect: openai
    base_url: "mock:"
    pass_client_key: true
    sign: {scheme: bearer, key: "env:KEY"}
"""


def test_passing_the_clients_key_beside_our_own_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOTH)
    environ = {"KEY": "sk-canary-of-this-test"}
    with pytest.raises(ConfigError) as raised:
        bind(load_config(path, environ), environ)
    (problem,) = raised.value.problems
    assert str(problem) == (
        f"{path}:6:5: upstreams.up.sign: cannot go with `pass_client_key`: remove one"
    )


def test_both_may_be_written_when_the_clients_key_is_not_passed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOTH.replace("pass_client_key: true", "pass_client_key: false"))
    environ = {"KEY": "sk-canary-of-this-test"}
    assert bind(load_config(path, environ), environ).config.upstreams["up"].pass_client_key is False


async def test_check_tells_where_a_passed_key_meets_the_keys_of_teams(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = BOTH.replace('    sign: {scheme: bearer, key: "env:KEY"}\n', "")
    (tmp_path / "key").write_text("sk-key-of-the-team")
    (tmp_path / "team.yaml").write_text("team: search\nkeys: [file:key]\n")
    path.write_text(text + "teams: team.yaml\n")
    result = await finished("check", str(path))
    assert result.code == 0
    assert result.err == (
        f"note: {path}:5:22: upstreams.up.pass_client_key: a client's key that is its team's is "
        "never sent on: it needs another header for the provider's"
    )
    path.write_text(text)
    result = await finished("check", str(path))
    assert (result.code, result.err) == (0, "")
