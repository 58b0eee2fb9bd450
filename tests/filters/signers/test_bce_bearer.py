"""Qianfan v2's tokens: asked for by a signed request, read with care, and sent as they are."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from filters.signers.bce_auth_v1 import Credentials
from filters.signers.bce_bearer import SCHEME, Options
from filters.signers.scheme import Request, TokenRequest
from filters.signers.vector import BadVector, sign_vector
from filters.stores.tokens import NoToken, Token
from sidecar.api import Secret
from tests.support.fetching import ask
from tests.support.upstream import RawUpstream

NOW = datetime(2024, 11, 28, 6, 9, 57, tzinfo=UTC).timestamp()
DATE = "2024-11-28T06:09:57Z"
DAY_S = 24 * 3600
KEY_ID = "fakeak0123456789abcdef0123456789"
KEY = "fakesk9876543210fedcba9876543210"
TOKEN = "bce-v3/ALTAK-fakeGzuFQ4/fe67e09604d84f8a9b1f43edbd"

assert SCHEME.exchange is not None
EXCHANGE = SCHEME.exchange


def token_request(options: Options | None = None, token: str | None = None) -> TokenRequest:
    credentials = Credentials(
        access_key_id=Secret(KEY_ID),
        secret_access_key=Secret(KEY),
        security_token=None if token is None else Secret(token),
    )
    return EXCHANGE.request(credentials, options or Options(), NOW)


def signed_get(url: str, token: str | None = None) -> dict[str, str]:
    """The headers of a GET of `url` by scheme `bce-auth-v1`, whose own tests hold it to the SDK."""
    vector = {
        "scheme": "bce-auth-v1",
        "credentials": {
            "access_key_id": KEY_ID,
            "secret_access_key": KEY,
            "security_token": token,
        },
        "request": {"method": "GET", "url": url},
    }
    found: dict[str, str] = sign_vector(vector, now=NOW, nonce="")["headers"]
    return found


def answer(**fields: Any) -> dict[str, Any]:
    """As the documentation shows it, with `fields` in place of its own."""
    return {
        "userId": "27f881fake842bf",
        "token": TOKEN,
        "status": "enable",
        "createTime": "2024-11-28T06:09:57.000Z",
        "expireTime": "2024-11-29T06:09:57.000Z",
        **fields,
    }


def read(what: Any, status: int = 201, now: float = NOW) -> Token:
    return EXCHANGE.read(status, json.dumps(what).encode(), now)


# The request


@pytest.mark.parametrize("token", [None, "FwoGFAKE/token+=="], ids=["", "token"])
def test_token_is_asked_for_by_a_signed_request(token: str | None) -> None:
    request = token_request(token=token)
    url = "https://iam.bj.baidubce.com/v1/BCE-BEARER/token?expireInSeconds=43200"
    assert (request.method, request.url, request.body) == ("GET", url, b"")
    assert request.headers == {"Host": "iam.bj.baidubce.com", **signed_get(url, token)}
    assert request.headers["x-bce-date"] == DATE
    assert f"/{DATE}/1800/host;x-bce-date" in request.headers["Authorization"]


@pytest.mark.parametrize(
    ("token_url", "url", "host"),
    [
        ("https://IAM.example", "https://iam.example/", "iam.example"),
        ("https://iam.example:443/a%2fb", "https://iam.example:443/a%2fb", "iam.example:443"),
        ("http://127.0.0.1:8080/token", "http://127.0.0.1:8080/token", "127.0.0.1:8080"),
    ],
)
def test_options_are_part_of_what_is_signed(token_url: str, url: str, host: str) -> None:
    request = token_request(Options(token_url=token_url, expire_in_seconds=600))
    assert request.url == f"{url}?expireInSeconds=600"
    assert request.headers == {"Host": host, **signed_get(request.url)}


async def test_signature_is_good_for_what_arrives() -> None:
    async with RawUpstream() as upstream:
        request = token_request(Options(token_url=f"{upstream.base_url}/v1/BCE-BEARER/token"))
        asked = asyncio.ensure_future(ask(request))
        connection = await upstream.accept()
        head = (await connection.read_request()).decode()
        body = json.dumps(answer()).encode()
        connection.write(
            b"HTTP/1.1 201 Created\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        fetched = await asked
    target, *lines = head.partition("\r\n\r\n")[0].split("\r\n")
    method, path, _ = target.split(" ")
    assert method == "GET"
    fields = dict(line.split(": ", 1) for line in lines)
    expected = signed_get(f"http://{fields['Host']}{path}")
    assert {name: fields[name] for name in expected} == expected
    assert EXCHANGE.read(fetched.status, fetched.body, NOW).value == TOKEN


def test_neither_request_nor_token_show_a_secret() -> None:
    shown = f"{token_request(token='STSsecret')!r} {read(answer())!r}"
    assert all(each not in shown for each in (KEY_ID, KEY, "STSsecret", TOKEN, "bce-auth"))


# The answer


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine's own zone is another."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC-11")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("status", [200, 201])
def test_token_is_renewed_in_the_last_tenth_of_its_life(status: int) -> None:
    token = read(answer(), status)
    assert token == Token(TOKEN, NOW + DAY_S * 0.9, NOW + DAY_S)


def test_time_of_creation_and_status_may_be_missing() -> None:
    what = {"token": TOKEN, "expireTime": "2024-11-29T06:09:57Z"}
    assert read(what) == Token(TOKEN, NOW + DAY_S * 0.9, NOW + DAY_S)


@pytest.mark.parametrize(
    "text", ["2024-11-29T14:09:57+08:00", "2024-11-29T06:09:57", "2024-11-29T06:09:57.000Z"]
)
def test_time_is_of_its_zone_or_utc(text: str, far_from_utc: None) -> None:
    assert read(answer(expireTime=text)).expires_at == NOW + DAY_S


def test_clock_of_ours_that_is_late_does_not_make_a_token_live_longer() -> None:
    now = NOW - 3600
    assert read(answer(), now=now).expires_at == now + DAY_S


def test_token_that_is_not_new_lives_until_its_end() -> None:
    now = NOW + DAY_S / 2
    assert read(answer(), now=now) == Token(TOKEN, NOW + DAY_S * 0.95, NOW + DAY_S)


@pytest.mark.parametrize("end", ["2025-11-28T06:09:57Z", "9999-12-31T23:59:59Z"])
def test_token_is_not_used_for_longer_than_the_provider_gives_any(end: str) -> None:
    assert read(answer(expireTime=end)).expires_at == NOW + 30 * DAY_S


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"token": None}, "instead of a token came status 201$"),
        ({"token": 5}, "cannot be sent"),
        ({"token": "hidden\r\nx: y"}, "cannot be sent"),
        ({"token": "h" * 5000}, "cannot be sent"),
        ({"token": "hidden", "status": "disable"}, "disabled"),
        ({"token": "hidden", "expireTime": None}, "expireTime"),
        ({"token": "hidden", "expireTime": "soon"}, "expireTime"),
        ({"token": "hidden", "expireTime": [5]}, "expireTime"),
        ({"token": "hidden", "expireTime": 5}, "expired already"),
        ({"token": "hidden", "expireTime": "0001-01-01T00:00:00+23:00"}, "expired already"),
        ({"token": "hidden", "expireTime": "2024-11-28T06:09:57Z"}, "expired already"),
        ({"token": "hidden", "createTime": "2024-11-29T06:09:57Z"}, "expired already"),
    ],
)
def test_token_that_cannot_be_used_is_refused_without_being_shown(
    fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(NoToken, match=problem) as caught:
        read(answer(**fields))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "InvalidAccessKeyId"),
        (403, "AccessDenied"),
        (400, "SignatureDoesNotMatch"),
        (400, "RequestExpired"),
    ],
)
def test_error_is_told_with_its_code_alone(status: int, code: str) -> None:
    message = f"The Access Key ID {KEY_ID} you provided does not exist in our records."
    with pytest.raises(NoToken) as caught:
        read({"requestId": "47e0ef1a", "code": code, "message": message}, status)
    assert str(caught.value) == f"instead of a token came status {status}: {code}"


# Calls


def test_token_is_sent_as_bearer_and_the_caller_s_is_taken_off() -> None:
    request = Request("POST", "qianfan.baidubce.com", "/v2/chat/completions", "a=1", (), None)
    signed = SCHEME.sign(request, Token(TOKEN, NOW, NOW), Options(), NOW, "unused")
    assert signed.headers == {"Authorization": f"Bearer {TOKEN}"}
    assert signed.query is None
    assert "authorization" in SCHEME.own_headers
    assert not SCHEME.needs_body(Options())


def test_there_is_nothing_to_show_without_a_token() -> None:
    with pytest.raises(BadVector, match="has to be fetched"):
        sign_vector({"scheme": "bce-bearer"}, now=NOW, nonce="")


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_url", "iam.bj.baidubce.com"),
        ("token_url", "https://iam.bj.baidubce.com/v1/BCE-BEARER/token?expireInSeconds=1"),
        ("expire_in_seconds", 0),
        ("expire_in_seconds", 30 * DAY_S + 1),
        ("expire_in_seconds", 1e4),
    ],
)
def test_setting_that_cannot_work_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        Options(**{field: value})
