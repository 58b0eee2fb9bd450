"""Ark's keys: asked for as the provider's signer would, read with care, and sent as they are."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import ValidationError
from volcengine.auth.SignerV4 import SignerV4
from volcengine.base.Request import Request as SdkRequest
from volcengine.Credentials import Credentials as SdkCredentials

from filters.signers.exchange import LONGEST_TOKEN
from filters.signers.scheme import Request, TokenRequest
from filters.signers.vector import BadVector, sign_vector
from filters.signers.volcengine_ark import ERRORS, SCHEME, Credentials, Options
from filters.stores.tokens import NoToken, Token
from sidecar.api import Secret
from tests.support.fetching import ask
from tests.support.upstream import RawUpstream

NOW = datetime(2025, 1, 8, 7, 23, 36, tzinfo=UTC).timestamp()
DATE = "20250108T072336Z"
DAY_S = 24 * 3600
KEY_ID = "AKLTfakeNTY3ODkwYWJjZGVm"
KEY = "fakeTVRJek5EVTJOemc5TUFiY2RlZg=="
ENDPOINT = "ep-20240101000000-abcde"
OPTIONS = Options(resource_ids=[ENDPOINT])
QUERY = "Action=GetApiKey&Version=2024-01-01"
API_KEY = "01234567-89ab-cdef-0123-456789abcdef"

assert SCHEME.exchange is not None
EXCHANGE = SCHEME.exchange


def key_request(options: Options = OPTIONS, token: str | None = None) -> TokenRequest:
    credentials = Credentials(
        access_key_id=Secret(KEY_ID),
        secret_access_key=Secret(KEY),
        session_token=None if token is None else Secret(token),
    )
    return EXCHANGE.request(credentials, options, NOW)


def read(answer: Any, status: int = 200) -> Token:
    return EXCHANGE.read(status, json.dumps(answer).encode(), NOW)


def result(**fields: Any) -> dict[str, Any]:
    metadata = {"RequestId": "20250108152350029189016106C67393", "Action": "GetApiKey"}
    return {"ResponseMetadata": metadata, "Result": fields}


def error(code: Any, message: Any) -> dict[str, Any]:
    return {"ResponseMetadata": {"RequestId": "1", "Error": {"Code": code, "Message": message}}}


def sdk_headers(host: str, path: str, body: bytes, region: str, token: str = "") -> dict[str, str]:
    theirs = SdkRequest()
    theirs.set_method("POST")
    theirs.set_path(path)
    theirs.set_query({"Action": "GetApiKey", "Version": "2024-01-01"})
    theirs.set_headers({"Host": host, "Content-Type": "application/json"})
    theirs.set_body(body)
    with patch.object(SignerV4, "get_current_format_date", lambda: DATE):
        SignerV4.sign(theirs, SdkCredentials(KEY_ID, KEY, "ark", region, token))
    return dict(theirs.headers)


# The request


def test_key_is_asked_for_the_resources_for_seven_days() -> None:
    request = key_request()
    assert request.method == "POST"
    assert request.url == f"https://open.volcengineapi.com/?{QUERY}"
    assert json.loads(request.body) == {
        "DurationSeconds": 7 * DAY_S,
        "ResourceType": "endpoint",
        "ResourceIds": [ENDPOINT],
    }


def test_options_are_part_of_the_request() -> None:
    options = Options(
        resource_type="bot",
        resource_ids=["bot-1", "bot-2"],
        duration_seconds=86400,
        region="ap-southeast-1",
        token_url="https://Control.example:8443/base",
    )
    request = key_request(options)
    assert request.url == f"https://control.example:8443/base?{QUERY}"
    assert json.loads(request.body) == {
        "DurationSeconds": 86400,
        "ResourceType": "bot",
        "ResourceIds": ["bot-1", "bot-2"],
    }
    assert "/20250108/ap-southeast-1/ark/request, " in request.headers["Authorization"]


@pytest.mark.parametrize("token", [None, "STSeyJ+/=="], ids=["", "token"])
@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://open.volcengineapi.com", "open.volcengineapi.com", "/"),
        ("https://open.volcengineapi.com:443/", "open.volcengineapi.com:443", "/"),
        ("http://127.0.0.1:8080/base/path", "127.0.0.1:8080", "/base/path"),
    ],
)
def test_request_is_signed_as_the_provider_s_signer_would(
    url: str, host: str, path: str, token: str | None
) -> None:
    request = key_request(Options(resource_ids=[ENDPOINT], token_url=url), token)
    assert request.headers == sdk_headers(host, path, request.body, "cn-beijing", token or "")


async def test_signature_is_good_for_what_arrives() -> None:
    async with RawUpstream() as upstream:
        options = Options(resource_ids=[ENDPOINT], token_url=upstream.base_url)
        request = key_request(options)
        asked = asyncio.ensure_future(ask(request))
        connection = await upstream.accept()
        head, _, body = (await connection.read_request()).partition(b"\r\n\r\n")
        connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await asked
    target, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert target == f"POST /?{QUERY} HTTP/1.1"
    expected = sdk_headers(fields["Host"], "/", body, "cn-beijing")
    assert {name: fields[name] for name in expected} == expected


def test_neither_request_nor_token_show_a_secret() -> None:
    request = key_request(token="STSsecret")
    shown = f"{request!r} {Token(API_KEY, NOW, NOW)!r}"
    assert all(each not in shown for each in (KEY_ID, KEY, "STSsecret", API_KEY, "Signature"))


# The answer


@pytest.mark.parametrize("expired_time", [int(NOW) + DAY_S, "2025-01-09T07:23:36Z"])
def test_key_is_read_and_renewed_half_an_hour_before_its_end(expired_time: Any) -> None:
    token = read(result(ApiKey=API_KEY, ExpiredTime=expired_time))
    assert token == Token(API_KEY, NOW + DAY_S - 1800, NOW + DAY_S)


@pytest.mark.parametrize(
    "text", ["2025-01-09T15:23:36+08:00", "2025-01-09T07:23:36", "2025-01-09T07:23:36.000Z"]
)
def test_time_as_text_is_of_its_zone_or_utc(text: str) -> None:
    assert read(result(ApiKey=API_KEY, ExpiredTime=text)).expires_at == NOW + DAY_S


def test_short_key_is_renewed_halfway() -> None:
    token = read(result(ApiKey=API_KEY, ExpiredTime=NOW + 600))
    assert (token.refresh_at, token.expires_at) == (NOW + 300, NOW + 600)


@pytest.mark.parametrize("expired_time", [NOW * 1000, 6284803330771822476, "9999-12-31T00:00:00Z"])
def test_key_is_not_used_for_longer_than_the_provider_gives_any(expired_time: Any) -> None:
    token = read(result(ApiKey=API_KEY, ExpiredTime=expired_time))
    assert token.expires_at == NOW + 30 * DAY_S


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "without a key"),
        ({"ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "", "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": 5, "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "hidden\r\nx: y", "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "hidden key", "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "hidden\n", "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "hiddené", "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "h" * (LONGEST_TOKEN + 1), "ExpiredTime": NOW + 60}, "ApiKey"),
        ({"ApiKey": "hidden"}, "ExpiredTime"),
        ({"ApiKey": "hidden", "ExpiredTime": None}, "ExpiredTime"),
        ({"ApiKey": "hidden", "ExpiredTime": True}, "ExpiredTime"),
        ({"ApiKey": "hidden", "ExpiredTime": "soon"}, "ExpiredTime"),
        ({"ApiKey": "hidden", "ExpiredTime": [1]}, "ExpiredTime"),
        ({"ApiKey": "hidden", "ExpiredTime": 0}, "expired already"),
        ({"ApiKey": "hidden", "ExpiredTime": NOW}, "expired already"),
        ({"ApiKey": "hidden", "ExpiredTime": "2025-01-08T07:23:36Z"}, "expired already"),
    ],
)
def test_key_that_cannot_be_used_is_refused_without_being_shown(
    fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(NoToken, match=problem) as caught:
        read(result(**fields))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b'{"Result":', b"NaN"])
def test_answer_without_json_is_refused(body: bytes) -> None:
    with pytest.raises(NoToken, match="answered 502 without JSON"):
        EXCHANGE.read(502, body, NOW)


@pytest.mark.parametrize(
    "answer", [[], None, "text", {"Result": []}, {"ResponseMetadata": {"Error": None}}]
)
def test_json_of_another_shape_is_refused(answer: Any) -> None:
    with pytest.raises(NoToken, match="answered 200 without a key"):
        read(answer)


def test_key_of_an_answer_that_is_no_success_is_not_taken() -> None:
    with pytest.raises(NoToken, match="answered 500 without a key"):
        read(result(ApiKey=API_KEY, ExpiredTime=NOW + DAY_S), 500)


# Errors


@pytest.mark.parametrize("status", [200, 400, 401, 403])
def test_error_is_told_with_its_code_and_message(status: int) -> None:
    message = "The signature of the request is expired."
    with pytest.raises(NoToken) as caught:
        read(error("InvalidTimestamp", message), status)
    assert str(caught.value) == f"GetApiKey was answered {status}: InvalidTimestamp: {message}"


@pytest.mark.parametrize(
    "message",
    [
        f"The accesskey [{KEY_ID}] included in the request is invalid.",
        f"no such key: {KEY_ID[:12]}…, signed {KEY}",
        *(None, "", 5, [KEY], {"key": KEY}),
    ],
)
def test_message_that_may_name_a_credential_is_not_shown(message: Any) -> None:
    with pytest.raises(NoToken) as caught:
        read(error("InvalidAccessKey", message), 401)
    assert str(caught.value) == "GetApiKey was answered 401: InvalidAccessKey"


@pytest.mark.parametrize("code", [None, "", 100009, ["InvalidAccessKey"], KEY_ID, f"a {KEY}"])
def test_unknown_code_is_not_shown(code: Any) -> None:
    with pytest.raises(NoToken) as caught:
        read(error(code, "why"), 400)
    assert str(caught.value) == "GetApiKey was answered 400"


def test_what_may_be_told_has_no_place_for_anything_else() -> None:
    assert all("%" not in each and "{" not in each and "[" not in each for each in ERRORS)


# Calls


def test_key_is_sent_as_bearer_and_the_caller_s_is_taken_off() -> None:
    request = Request("POST", "ark.cn-beijing.volces.com", "/api/v3/chat/completions", "", (), None)
    signed = SCHEME.sign(request, Token(API_KEY, NOW, NOW), OPTIONS, NOW, "unused")
    assert signed.headers == {"Authorization": f"Bearer {API_KEY}"}
    assert signed.query is None
    assert "authorization" in SCHEME.own_headers
    assert not SCHEME.needs_body(OPTIONS)


def test_there_is_nothing_to_show_without_a_key() -> None:
    with pytest.raises(BadVector, match="has to be fetched"):
        sign_vector({"scheme": "volcengine-ark"}, now=NOW, nonce="")


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("region", "cn beijing"),
        ("resource_type", "model"),
        ("resource_ids", []),
        ("resource_ids", [""]),
        ("resource_ids", ["ep 1"]),
        ("resource_ids", "ep-1"),
        ("duration_seconds", 0),
        ("duration_seconds", 30 * DAY_S + 1),
        ("token_url", "ftp://open.volcengineapi.com/"),
        ("token_url", "open.volcengineapi.com"),
        ("token_url", "https://"),
        ("token_url", "https://:443/"),
        ("token_url", "https://host:port/"),
        ("token_url", "https://host:0/"),
        ("token_url", "https://user@host/"),
        ("token_url", "https://host/?a=b"),
        ("token_url", "https://host/?"),
        ("token_url", "https://host/#a"),
        ("token_url", "https://host/a b"),
        ("token_url", "https://host/é"),
    ],
)
def test_setting_that_cannot_work_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        Options(**{"resource_ids": [ENDPOINT], field: value})


def test_resources_have_to_be_named() -> None:
    with pytest.raises(ValidationError, match="resource_ids"):
        Options()
