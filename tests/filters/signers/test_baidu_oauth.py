"""Qianfan v1's access tokens: asked for as documented, read with care, sent in the query."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from pydantic import ValidationError

from filters.signers.baidu_oauth import SCHEME, Credentials, Options
from filters.signers.scheme import Request, Signed, TokenRequest
from filters.signers.vector import BadVector, sign_vector
from filters.stores.tokens import NoToken, Token
from sidecar.api import Secret
from tests.support.fetching import ask
from tests.support.upstream import RawUpstream

NOW = 1_719_820_800.0
DAY_S = 24 * 3600
CLIENT_ID = "Va5yQRHlA4Fq4eR3LT0vuXV4"
CLIENT_SECRET = "0rDSjzQ20XUj5itV7WRtznPQSzr5pVw2"
ACCESS_TOKEN = "24.6c5e1ff107f0e8bcef8c46d3424a0e78.2592000.1485516651.282335-8574074"

assert SCHEME.exchange is not None
EXCHANGE = SCHEME.exchange


def token_request(
    options: Options | None = None, client_id: str = CLIENT_ID, secret: str = CLIENT_SECRET
) -> TokenRequest:
    credentials = Credentials(client_id=Secret(client_id), client_secret=Secret(secret))
    return EXCHANGE.request(credentials, options or Options(), NOW)


def answer(**fields: Any) -> dict[str, Any]:
    """As the documentation shows it, with `fields` in place of its own."""
    return {
        "refresh_token": "25.b55fe1d287227ca97aab219bb249b8ab.315360000.1798284651.282335-8574074",
        "expires_in": 2_592_000,
        "session_key": "9mzdDZXu3dENdFZQurfg0Vz8slgSgvvOAUebNFzyzcpQ5EnbxbF+hfG9DQkpUVQdh4p6HbQ",
        "access_token": ACCESS_TOKEN,
        "scope": "public wise_adapt",
        "session_secret": "dfac94a3489fe9fca7c3221cbf7525ff",
        **fields,
    }


def read(what: Any, status: int = 200) -> Token:
    return EXCHANGE.read(status, json.dumps(what).encode(), NOW)


# The request


def test_token_is_asked_for_with_both_secrets_in_the_query() -> None:
    request = token_request()
    assert request.method == "POST"
    assert request.body == b""
    assert request.headers["Content-Type"] == "application/json"
    assert request.url == (
        "https://aip.baidubce.com/oauth/2.0/token?grant_type=client_credentials"
        f"&client_id={CLIENT_ID}&client_secret={CLIENT_SECRET}"
    )


def test_secrets_are_percent_encoded() -> None:
    request = token_request(client_id="a b&grant_type=x", secret="#/+%é")
    parts = urlsplit(request.url)
    assert parts.fragment == ""
    assert parse_qsl(parts.query) == [
        ("grant_type", "client_credentials"),
        ("client_id", "a b&grant_type=x"),
        ("client_secret", "#/+%é"),
    ]


async def test_request_arrives_as_it_was_made() -> None:
    async with RawUpstream() as upstream:
        options = Options(token_url=f"{upstream.base_url}/private/token")
        request = token_request(options, secret="a+b c")
        asked = asyncio.ensure_future(ask(request))
        connection = await upstream.accept()
        head = (await connection.read_request()).decode()
        body = json.dumps(answer()).encode()
        connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        fetched = await asked
    target, *lines = head.split("\r\n")
    assert target == (
        "POST /private/token?grant_type=client_credentials"
        f"&client_id={CLIENT_ID}&client_secret=a%2Bb%20c HTTP/1.1"
    )
    assert "Content-Type: application/json" in lines
    assert EXCHANGE.read(fetched.status, fetched.body, NOW).value == ACCESS_TOKEN


def test_neither_request_nor_token_show_a_secret() -> None:
    shown = f"{token_request()!r} {read(answer())!r}"
    assert all(each not in shown for each in (CLIENT_ID, CLIENT_SECRET, ACCESS_TOKEN))


# The answer


def test_token_is_good_for_thirty_days_and_renewed_an_hour_before() -> None:
    assert read(answer()) == Token(ACCESS_TOKEN, NOW + 30 * DAY_S - 3600, NOW + 30 * DAY_S)


@pytest.mark.parametrize(
    ("life_s", "before_s"), [(36_000, 3600), (35_000, 3500), (600, 60), (0.5, 0.05)]
)
def test_short_token_is_renewed_in_the_last_tenth_of_its_life(
    life_s: float, before_s: float
) -> None:
    token = read(answer(expires_in=life_s))
    assert token.expires_at == NOW + life_s
    assert token.refresh_at == pytest.approx(NOW + life_s - before_s, abs=1e-3)


@pytest.mark.parametrize("expires_in", [30 * DAY_S + 1, 10**12, 10**18, 1e300])
def test_token_is_not_used_for_longer_than_the_provider_gives_any(expires_in: float) -> None:
    assert read(answer(expires_in=expires_in)).expires_at == NOW + 30 * DAY_S


@pytest.mark.parametrize("expires_in", [0, -1, None, True, "2592000", [1], {}])
def test_token_without_a_life_is_refused(expires_in: Any) -> None:
    with pytest.raises(NoToken, match="expires_in") as caught:
        read(answer(expires_in=expires_in))
    assert ACCESS_TOKEN not in str(caught.value)


@pytest.mark.parametrize("token", [5, "", "a b", "a\r\nb", "a" * 5000])
def test_token_that_cannot_be_sent_is_refused(token: Any) -> None:
    with pytest.raises(NoToken, match="access_token that came cannot be sent"):
        read(answer(access_token=token))


@pytest.mark.parametrize("status", [200, 400, 401])
@pytest.mark.parametrize("description", ["unknown client id", "Client authentication failed"])
def test_error_tells_which_of_the_secrets_is_wrong(status: int, description: str) -> None:
    with pytest.raises(NoToken) as caught:
        read({"error": "invalid_client", "error_description": description}, status)
    assert str(caught.value) == (
        f"instead of a token came status {status}: invalid_client: {description}"
    )


def test_error_does_not_tell_what_it_repeats_of_the_secrets() -> None:
    with pytest.raises(NoToken) as caught:
        read({"error": "invalid_client", "error_description": f"no {CLIENT_ID}"}, 401)
    assert str(caught.value) == "instead of a token came status 401: invalid_client"


# Calls


def signed(query: str) -> Signed:
    path = "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/completions"
    request = Request("POST", "aip.baidubce.com", path, query, (), None)
    return SCHEME.sign(request, Token("24.a/b+c", NOW, NOW), Options(), NOW, "unused")


@pytest.mark.parametrize(
    ("query", "wire"),
    [
        ("", "access_token=24.a%2Fb%2Bc"),
        ("a=%2f&b", "a=%2f&b&access_token=24.a%2Fb%2Bc"),
        ("access_token=theirs&a=1", "a=1&access_token=24.a%2Fb%2Bc"),
        ("access%5ftoken=theirs&access_token", "access_token=24.a%2Fb%2Bc"),
    ],
)
def test_token_is_sent_in_the_query_in_place_of_the_caller_s(query: str, wire: str) -> None:
    assert signed(query) == Signed({}, wire)


def test_caller_s_authorization_is_taken_off_and_the_body_left_alone() -> None:
    assert "authorization" in SCHEME.own_headers
    assert not SCHEME.needs_body(Options())


@pytest.mark.parametrize(
    "body",
    [
        b'{"error_code":110,"error_msg":"Access token invalid or no longer valid"}',
        b'{"error_code":111,"error_msg":"Access token expired"}',
        b'{"id": "as-1", "error_code": 110, "error_msg": "..."}',
        b'{"error_msg": "...", "error_code": 111}',
    ],
)
def test_answer_to_a_token_that_is_not_good_any_more_is_known(body: bytes) -> None:
    assert any(mark in body for mark in EXCHANGE.refused)


@pytest.mark.parametrize(
    "body",
    [
        b'{"error_code":18,"error_msg":"Open api qps request limit reached"}',
        b'{"error_code":336110}',
        b'{"id":"as-1","result":"{\\"error_code\\":110}"}',
    ],
)
def test_other_answer_is_not_taken_for_one(body: bytes) -> None:
    assert not any(mark in body for mark in EXCHANGE.refused)


def test_there_is_nothing_to_show_without_a_token() -> None:
    with pytest.raises(BadVector, match="has to be fetched"):
        sign_vector({"scheme": "baidu-oauth"}, now=NOW, nonce="")


def test_address_that_would_take_the_secrets_elsewhere_is_refused() -> None:
    for url in ("https://user@host/token", "https://host/token?a=b", "file:///token"):
        with pytest.raises(ValidationError, match="token_url"):
            Options(token_url=url)
