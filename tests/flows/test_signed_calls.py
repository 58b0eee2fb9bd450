"""Every signing scheme, through the sidecar to a server that makes each signature itself.

A call is answered 503 first, so that the retry's signature is seen too. The wall clock goes a
second on with each reading, and from one year into the next.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from sidecar.clock import SystemClock
from tests.support.flow import CHAT, Flow, RawClient, Start, chat_body, until
from tests.support.verifiers import (
    CLIENT_SECRET,
    Acs3,
    Aws,
    BaiduOauth,
    Bce,
    BceBearer,
    Fixed,
    Granting,
    Iflytek,
    MovingClock,
    Received,
    Refused,
    Tc3,
    Verifier,
    VerifyingServer,
    Volcengine,
    VolcengineArk,
    Zhipu,
    basic,
    bearer,
    verifying,
)

# On newer Pythons; by Baidu's SDK.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")

Fields = Iterable[tuple[str, str]]

KEY_ID, KEY, TOKEN = "key-id-of-the-sidecar", "secret-key/of+the=sidecar", "session/token=="
ZHIPU_KEY = "0123456789abcdef.secret-of-the-sidecar"
PASSWORD = "pass:wörd"
ENVIRON = {
    "KEY_ID": KEY_ID,
    "KEY": KEY,
    "TOKEN": TOKEN,
    "ZHIPU_KEY": ZHIPU_KEY,
    "PASSWORD": PASSWORD,
}
PAIR = {"access_key_id": "env:KEY_ID", "secret_access_key": "env:KEY"}
BCE = {"scheme": "bce-auth-v1", **PAIR}
ACS3 = {
    "scheme": "ACS3-HMAC-SHA256",
    "access_key_id": "env:KEY_ID",
    "access_key_secret": "env:KEY",
}
TC3 = {
    "scheme": "TC3-HMAC-SHA256",
    "secret_id": "env:KEY_ID",
    "secret_key": "env:KEY",
    "service": "hunyuan",
}
VOLCENGINE = {
    "scheme": "volcengine-HMAC-SHA256",
    **PAIR,
    "region": "cn-beijing",
    "service": "iam",
}
AWS = {"scheme": "AWS4-HMAC-SHA256", **PAIR, "region": "us-east-1"}
IFLYTEK = {"scheme": "iflytek-hmac-sha256", "api_key": "env:KEY_ID", "api_secret": "env:KEY"}

JSON = ("content-type", "application/json; charset=utf-8")
AUDIO = ("content-type", "audio/wav")
CLIENT_KEYS = [
    ("Authorization", f"Bearer {CLIENT_SECRET}"),
    ("authorization", f"{CLIENT_SECRET} again"),
    ("X-Api-Key", CLIENT_SECRET),
    ("api-key", CLIENT_SECRET),
    ("x-goog-api-key", CLIENT_SECRET),
    ("cookie", f"key={CLIENT_SECRET}"),
]

AWKWARD_PATH = "/%E4%BD%A0%E5%A5%BD/a~b/x%2Fy/v1:0/c%3Ad/e+f"
AWKWARD_QUERY = "b=2&a=3&a=1&A=0&a10=x&empty=&flag&text=%E6%96%87%20%26%3D&tilde=~&plus=%2B"


@dataclass(frozen=True)
class Case:
    """A scheme with one set of options, and how its provider checks it."""

    id: str
    sign: Mapping[str, Any]
    """The upstream's section, but for a `token_url`."""
    verifier: Callable[[], Verifier]
    sent: Fields = ()
    """The client's own headers that the scheme signs; they have to arrive."""
    stale: Fields = ()
    """The client's own signature over another request, which must not arrive."""
    stale_query: str = ""
    covers: str = ""
    """What of a request cannot change without the signature: method, path, query, body."""
    shows: str = "authorization"
    """The field with the key or the signature, or the parameter with it, after a `?`."""
    is_dated: bool = True
    """Whether each signature is over a new time."""

    @property
    def holds_body(self) -> bool:
        return "body" in self.covers

    def __repr__(self) -> str:
        return self.id


AT_ALIBABA = {"action": "CreateSession", "version": "2023-12-29"}
AT_TENCENT = {"action": "ChatCompletions", "version": "2023-09-01"}
ALIBABA_ACTION = [(f"x-acs-{name}", value) for name, value in AT_ALIBABA.items()]
TENCENT_ACTION = [(f"x-tc-{name}", value) for name, value in AT_TENCENT.items()]

BCE_SENT = [("x-bce-meta", " 文 : / "), ("x-bce-empty", "")]
BCE_STALE = [
    ("x-bce-date", "1999-01-01T00:00:00Z"),
    ("x-bce-security-token", CLIENT_SECRET),
    ("x-bce-content-sha256", CLIENT_SECRET),
]
ACS3_STALE = [
    ("x-acs-date", "1999-01-01T00:00:00Z"),
    ("x-acs-signature-nonce", CLIENT_SECRET),
    ("x-acs-content-sha256", CLIENT_SECRET),
    ("x-acs-security-token", CLIENT_SECRET),
    ("x-acs-accesskey-id", CLIENT_SECRET),
]
TC3_STALE = [
    ("X-TC-Timestamp", "915148800"),
    ("X-TC-Token", CLIENT_SECRET),
    ("X-TC-Content-SHA256", CLIENT_SECRET),
]
VOLCENGINE_STALE = [
    ("X-Date", "19990101T000000Z"),
    ("X-Content-Sha256", CLIENT_SECRET),
    ("X-Security-Token", CLIENT_SECRET),
]
AWS_SENT = [
    ("x-amz-meta-padded", "  two   words\t "),
    ("x-amz-meta-twice", "b"),
    ("x-amz-meta-twice", "a"),
    ("x-amz-meta-text", "文"),
]
AWS_STALE = [
    ("X-Amz-Date", "19990101T000000Z"),
    ("Date", "Fri, 01 Jan 1999 00:00:00 GMT"),
    ("X-Amz-Security-Token", CLIENT_SECRET),
    ("X-Amz-Content-Sha256", CLIENT_SECRET),
]
IFLYTEK_STALE = [
    ("Date", "Fri, 01 Jan 1999 00:00:00 GMT"),
    ("Digest", f"SHA-256={CLIENT_SECRET}"),
]

CASES = [
    # Keys as they are.
    Case(
        "bearer",
        {"scheme": "bearer", "key": "env:KEY"},
        lambda: bearer(KEY),
        is_dated=False,
    ),
    Case(
        "basic",
        {"scheme": "basic", "username": "bot", "password": "env:PASSWORD"},
        lambda: basic("bot", PASSWORD),
        is_dated=False,
    ),
    Case(
        "header",
        {"scheme": "header", "name": "X-Own-Key", "key": "env:KEY"},
        lambda: Fixed({"x-own-key": KEY}),
        shows="x-own-key",
        stale=[("x-own-key", CLIENT_SECRET), ("X-OWN-KEY", CLIENT_SECRET)],
        is_dated=False,
    ),
    Case(
        "query",
        {"scheme": "query", "key": "env:KEY"},
        lambda: Fixed(parameters={"key": KEY}),
        shows="?key",
        stale_query=f"key={CLIENT_SECRET}&%6Bey={CLIENT_SECRET}",
        is_dated=False,
    ),
    Case(
        "api-key",
        {"scheme": "api-key", "key": "env:KEY"},
        lambda: Fixed({"api-key": KEY}),
        shows="api-key",
        is_dated=False,
    ),
    Case(
        "x-goog-api-key",
        {"scheme": "x-goog-api-key", "key": "env:KEY"},
        lambda: Fixed({"x-goog-api-key": KEY}),
        shows="x-goog-api-key",
        is_dated=False,
    ),
    # Signatures.
    Case(
        "bce-auth-v1",
        BCE,
        lambda: Bce(KEY_ID, KEY),
        covers="method path query",
        sent=BCE_SENT,
        stale=BCE_STALE,
    ),
    Case(
        "bce-auth-v1 of a session",
        BCE | {"security_token": "env:TOKEN"},
        lambda: Bce(KEY_ID, KEY, TOKEN),
        covers="method path query",
        sent=BCE_SENT,
        stale=BCE_STALE,
    ),
    Case(
        "bce-auth-v1 without a list",
        BCE | {"signed_headers": None},
        lambda: Bce(KEY_ID, KEY),
        covers="method path query",
        sent=BCE_SENT,
        stale=BCE_STALE,
    ),
    Case(
        "ACS3",
        ACS3 | AT_ALIBABA,
        lambda: Acs3(KEY_ID, KEY, "CreateSession", "2023-12-29"),
        covers="method path query body",
        sent=[("x-acs-twice", "b"), ("x-acs-twice", "a"), ("x-acs-padded", " two  words ")],
        stale=ACS3_STALE,
    ),
    Case(
        "ACS3 of a session for the client's action",
        ACS3 | {"security_token": "env:TOKEN"},
        lambda: Acs3(KEY_ID, KEY, "CreateSession", "2023-12-29", TOKEN),
        covers="method path query body",
        sent=ALIBABA_ACTION,
        stale=ACS3_STALE,
    ),
    Case(
        "TC3",
        TC3 | AT_TENCENT | {"signed_headers": ["content-type", "host", "x-tc-action"]},
        lambda: Tc3(KEY_ID, KEY, "hunyuan", dict(TENCENT_ACTION)),
        covers="method body",
        stale=TC3_STALE,
    ),
    Case(
        "TC3 of a session for the client's action",
        TC3 | {"token": "env:TOKEN"},
        lambda: Tc3(KEY_ID, KEY, "hunyuan", dict(TENCENT_ACTION), TOKEN),
        covers="method body",
        sent=TENCENT_ACTION,
        stale=TC3_STALE,
    ),
    Case(
        "TC3 without the body",
        TC3 | AT_TENCENT | {"region": "ap-guangzhou", "unsigned_payload": True},
        lambda: Tc3(
            *(KEY_ID, KEY, "hunyuan"),
            {"x-tc-region": "ap-guangzhou", **dict(TENCENT_ACTION)},
            signs_body=False,
        ),
        covers="method",
        stale=TC3_STALE,
    ),
    Case(
        "volcengine",
        VOLCENGINE,
        lambda: Volcengine(KEY_ID, KEY, "cn-beijing", "iam"),
        covers="method path query body",
        sent=[("x-note", " two words "), ("content-md5", "bm90IGNoZWNrZWQ=")],
        stale=VOLCENGINE_STALE,
    ),
    Case(
        "volcengine of a session",
        VOLCENGINE | {"session_token": "env:TOKEN"},
        lambda: Volcengine(KEY_ID, KEY, "cn-beijing", "iam", TOKEN),
        covers="method path query body",
        stale=VOLCENGINE_STALE,
    ),
    Case(
        "AWS4",
        AWS,
        lambda: Aws(KEY_ID, KEY, "us-east-1", "bedrock"),
        covers="method path query body",
        sent=AWS_SENT,
        stale=AWS_STALE,
    ),
    Case(
        "AWS4 of a session",
        AWS | {"session_token": "env:TOKEN", "service": "bedrock-mantle"},
        lambda: Aws(KEY_ID, KEY, "us-east-1", "bedrock-mantle", TOKEN),
        covers="method path query body",
        sent=AWS_SENT,
        stale=AWS_STALE,
    ),
    Case(
        "iflytek in the query",
        IFLYTEK,
        lambda: Iflytek(KEY_ID, KEY, in_query=True),
        shows="?authorization",
        covers="method path",
        stale=IFLYTEK_STALE[:1],
        stale_query=(
            f"authorization={CLIENT_SECRET}&host={CLIENT_SECRET}"
            "&date=Fri%2C%2001%20Jan%201999%2000%3A00%3A00%20GMT"
        ),
    ),
    Case(
        "iflytek in headers",
        IFLYTEK | {"mode": "header-digest"},
        lambda: Iflytek(KEY_ID, KEY, in_query=False),
        covers="method path body",
        stale=IFLYTEK_STALE,
    ),
    # Tokens.
    Case(
        "zhipu",
        {"scheme": "zhipu-jwt-hs256", "api_key": "env:ZHIPU_KEY"},
        lambda: Zhipu(ZHIPU_KEY),
        is_dated=False,  # one token is good for some calls
    ),
    Case(
        "zhipu with short tokens",
        {"scheme": "zhipu-jwt-hs256", "api_key": "env:ZHIPU_KEY", "ttl_ms": 1000},
        lambda: Zhipu(ZHIPU_KEY),
    ),
    Case(
        "baidu-oauth",
        {"scheme": "baidu-oauth", "client_id": "env:KEY_ID", "client_secret": "env:KEY"},
        lambda: BaiduOauth(KEY_ID, KEY),
        shows="?access_token",
        stale_query=f"access_token={CLIENT_SECRET}",
        is_dated=False,
    ),
    Case(
        "bce-bearer",
        {"scheme": "bce-bearer", **PAIR},
        lambda: BceBearer(KEY_ID, KEY),
        is_dated=False,
    ),
    Case(
        "volcengine-ark",
        {"scheme": "volcengine-ark", **PAIR, "resource_ids": ["ep-1", "ep-2"]},
        lambda: VolcengineArk(KEY_ID, KEY, ["ep-1", "ep-2"]),
        is_dated=False,
    ),
]

each_case = pytest.mark.parametrize("case", CASES, ids=repr)
each_that_signs_bodies = pytest.mark.parametrize(
    "case", [each for each in CASES if each.holds_body], ids=repr
)
each_other = pytest.mark.parametrize(
    "case", [each for each in CASES if not each.holds_body], ids=repr
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MovingClock:
    clock = MovingClock()
    monkeypatch.setattr(SystemClock, "wall", staticmethod(clock.wall))
    return clock


@pytest.fixture
async def server(case: Case, clock: MovingClock) -> AsyncIterator[VerifyingServer]:
    async with verifying(case.verifier(), clock) as server:
        yield server


async def sidecar(start: Start, case: Case, server: VerifyingServer, more: str = "") -> Flow:
    """A sidecar that signs as `case` says for `server`, and tries once more after a 503."""
    sign = dict(case.sign)
    if isinstance(server.verifier, Granting):
        sign["token_url"] = f"{server.url}{server.verifier.token_path}"
    chain = {"call": ["tests.support.signing_filters:RetriesOnce"], "attempt": ["sign"]}
    config = {
        "upstreams": {"up-openai": {"base_url": f"{server.url}/v1", "sign": sign}},
        "chains": {"default": chain},
    }
    settings = "\n".join(f"{name}: {json.dumps(value)}" for name, value in config.items())
    return await start(f"{settings}\n{more}", environ=ENVIRON)


def request(
    case: Case,
    method: str,
    target: str,
    body: bytes | None,
    *fields: tuple[str, str],
    length: int | None = None,
) -> bytes:
    """A client's request, with everything that must not arrive.

    Without a body it is the head of one that follows: of `length` bytes, or in chunks.
    """
    path, _, query = target.partition("?")
    query = "&".join(each for each in (query, case.stale_query) if each)
    lines = [("host", "sidecar"), *CLIENT_KEYS, *case.stale, *case.sent, *fields]
    if body is not None and (body or method == "POST"):
        length = len(body)
    if length is not None:
        lines.append(("content-length", str(length)))
    elif body is None:
        lines.append(("transfer-encoding", "chunked"))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines)
    target = f"{path}?{query}" if query else path
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + (body or b"")


def assert_arrived(case: Case, request: Received, *fields: tuple[str, str]) -> None:
    """What the client sent for the upstream is there, as it was."""
    for name in {name for name, _ in (*case.sent, *fields)}:
        expected = [value.strip() for each, value in (*case.sent, *fields) if each == name]
        assert request.all(name) == expected


async def call(case: Case, server: VerifyingServer, client: RawClient, data: bytes) -> Received:
    """A call that is refused for the moment and then answered; the request that was answered."""
    before = len(server.received)
    server.statuses.extend([503, 200])
    answer = await client.call(data)
    assert server.refusals == []
    assert (answer.status, answer.json) == (200, {"verified": before + 2})
    first, second = server.received[before:]
    assert (first.method, first.path, first.body) == (second.method, second.path, second.body)
    assert [name for name, _ in first.fields] == [name for name, _ in second.fields]
    if case.is_dated:
        (first_at, _), (second_at, _) = server.proofs[before:]
        assert first_at is not None
        assert second_at is not None
        assert first_at < second_at
    else:
        assert first == second
    return second


# Accepted


@each_case
async def test_a_chat_call_and_its_retry_are_accepted(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await (await sidecar(start, case, server)).connect()
    body = chat_body()
    for _ in range(2):
        arrived = await call(case, server, client, request(case, "POST", CHAT, body, JSON))
        assert arrived.path == "/v1/chat/completions"
        assert arrived.body == body
        assert_arrived(case, arrived, JSON)
    if isinstance(server.verifier, Granting):
        assert server.verifier.granted == 1
    if case.is_dated:
        years = {datetime.fromtimestamp(proof.at or 0, UTC).year for proof in server.proofs}
        assert years == {2026, 2027}


@each_case
async def test_a_target_that_is_hard_to_sign_arrives_as_it_was_and_is_accepted(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await (await sidecar(start, case, server)).connect()
    target = f"/up-openai{AWKWARD_PATH}?{AWKWARD_QUERY}"
    for method, body in (("POST", chat_body()), ("PUT", chat_body()), ("GET", b"")):
        data = request(case, method, target, body, JSON)
        arrived = await call(case, server, client, data)
        assert arrived.path == f"/v1{AWKWARD_PATH}"
        assert arrived.query.startswith(AWKWARD_QUERY)
        assert arrived.body == body
        assert_arrived(case, arrived, JSON)


@each_case
async def test_calls_without_a_body_are_accepted(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await (await sidecar(start, case, server)).connect()
    for method, length in (("GET", []), ("POST", ["0"]), ("DELETE", [])):
        data = request(case, method, "/up-openai/files", b"")
        arrived = await call(case, server, client, data)
        assert arrived.body == b""
        assert arrived.all("content-length") == length
        assert_arrived(case, arrived)


@pytest.mark.parametrize(
    "case", [each for each in CASES if each.sign["scheme"] == VOLCENGINE["scheme"]], ids=repr
)
async def test_the_content_type_that_volcengine_s_sdks_add_arrives_and_is_accepted(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await (await sidecar(start, case, server)).connect()
    added = "application/x-www-form-urlencoded; charset=utf-8"
    bare = [("GET", b"", []), ("DELETE", b"", [added]), ("POST", b"", [added])]
    for method, body, types in [*bare, ("POST", chat_body(), [added])]:
        data = request(case, method, "/up-openai/files", body)
        arrived = await call(case, server, client, data)
        assert arrived.all("content-type") == types
        assert arrived.body == body
    data = request(case, "POST", "/up-openai/files", chat_body(), JSON)
    arrived = await call(case, server, client, data)
    assert_arrived(case, arrived, JSON)


@each_case
async def test_a_large_body_of_unicode_is_accepted(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await (await sidecar(start, case, server)).connect()
    text = "".join(map(chr, [*range(0x4E00, 0x9F00), *range(0x1F300, 0x1F600)])) + "\u2028\0"
    message = {"role": "user", "content": text * 2}
    body = json.dumps({"model": "gpt", "messages": [message]}, ensure_ascii=False).encode()
    assert len(body) > 100_000
    arrived = await call(case, server, client, request(case, "POST", CHAT, body, JSON))
    assert arrived.body == body


# Uploads

PIECES = [b"RIFF wave\r\n", b"0\r\n\r\n", "文".encode() * 1000, b"end"]
UPLOAD = b"".join(PIECES)
CHUNKS = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in PIECES)
LAST_CHUNK = b"0\r\n\r\n"


async def begin_upload(flow: Flow, case: Case) -> RawClient:
    """A client, the head of whose upload was taken; the body is still to come."""
    client = await flow.connect()
    client.send(request(case, "POST", "/up-openai/audio", None, AUDIO))
    await until(lambda: flow.server.snapshot.open_calls == 1)
    return client


@each_other
async def test_an_upload_streams_where_its_body_is_not_signed(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await begin_upload(await sidecar(start, case, server), case)
    client.send(CHUNKS)
    await until(lambda: server.begun == 1)
    answer = await client.call(LAST_CHUNK)
    assert server.refusals == []
    assert answer.status == 200
    (arrived,) = server.received
    assert arrived.all("transfer-encoding") == ["chunked"]
    assert arrived.all("content-length") == []
    assert arrived.body == UPLOAD
    assert_arrived(case, arrived, AUDIO)


@each_that_signs_bodies
async def test_an_upload_is_held_where_its_body_is_signed(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    client = await begin_upload(await sidecar(start, case, server), case)
    arrived = await call(case, server, client, CHUNKS + LAST_CHUNK)
    assert arrived.all("transfer-encoding") == []
    assert arrived.all("content-length") == [str(len(UPLOAD))]
    assert arrived.body == UPLOAD
    assert_arrived(case, arrived, AUDIO)


@each_that_signs_bodies
async def test_an_upload_that_is_too_large_to_be_held_is_refused_before_it_is_sent(
    start: Start, case: Case, server: VerifyingServer
) -> None:
    flow = await sidecar(start, case, server, "http: {max_body_bytes: 1000}")
    announced = request(case, "POST", "/up-openai/audio", None, AUDIO, length=1001)
    chunked = request(case, "POST", "/up-openai/audio", None, AUDIO) + CHUNKS
    for data in (announced, chunked):
        answer = await flow.call(data)
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert server.begun == 0


# Not accepted


@each_case
async def test_a_request_that_was_changed_on_its_way_is_not_believed(
    start: Start, case: Case, server: VerifyingServer, clock: MovingClock
) -> None:
    """Without this the tests above would show nothing."""
    client = await (await sidecar(start, case, server)).connect()
    data = request(case, "POST", f"/up-openai/x?{AWKWARD_QUERY}", chat_body(), JSON)
    arrived = await call(case, server, client, data)

    def is_believed(request: Received) -> bool:
        try:
            VerifyingServer(server.verifier, clock).believe(request)
        except Refused:
            return False
        return True

    if server.proofs[-1].once:
        with pytest.raises(Refused, match="came before"):
            server.believe(arrived)
    assert is_believed(arrived)  # where it did not come before
    for what, changed in changes(case, arrived):
        assert not is_believed(changed), what
    if case.is_dated:
        clock.now += 301
        assert not is_believed(arrived)
        clock.now -= 700
        assert not is_believed(arrived)


def changes(case: Case, request: Received) -> Iterator[tuple[str, Received]]:
    """What was changed, and the request with that change."""
    second = ("authorization", "Basic second")
    yield "a second authorization", replace(request, fields=(*request.fields, second, second))
    leak = ("x-leak", f"a {CLIENT_SECRET}")
    yield "a client's key in the head", replace(request, fields=(*request.fields, leak))
    yield "one in the target", replace(request, target=f"{request.target}&k={CLIENT_SECRET}")
    yield "one in the body", replace(request, body=CLIENT_SECRET.encode())
    if case.shows.startswith("?"):
        name = case.shows[1:]
        value = next(each for each in request.query.split("&") if each.startswith(f"{name}="))
        other = replace(request, target=request.target.replace(value, altered(value)))
    else:
        fields = [
            (name, altered(value) if name == case.shows else value)
            for name, value in request.fields
        ]
        other = replace(request, fields=tuple(fields))
    yield "another key or signature", other
    if "method" in case.covers:
        yield "another method", replace(request, method="PATCH")
    if "path" in case.covers:
        yield "another path", replace(request, target=request.target.replace("/x?", "/y?"))
    if "query" in case.covers:
        yield "another query", replace(request, target=request.target.replace("a=3&a=1", "a=4&a=1"))
    if "body" in case.covers:
        yield "another body", replace(request, body=request.body + b" ")


def altered(text: str) -> str:
    """`text` with one character changed."""
    return text[:-9] + ("x" if text[-9] != "x" else "y") + text[-8:]
