"""iFlytek's signature, held against published examples and the provider's own SDK."""

from __future__ import annotations

import base64
import hmac
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import Any, Literal
from unittest.mock import patch
from urllib.parse import parse_qsl, quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from xfyunsdkcore import signature as sdk

from filters.signers.iflytek import SCHEME, Credentials, Options
from filters.signers.scheme import Request, Signed
from filters.signers.vector import sign_vector
from sidecar.api import Secret
from tests.support.vectors import vectors_of

NOW = datetime(2024, 7, 1, 8, 0, 0, tzinfo=UTC).timestamp()
HOST = "emb-cn-huabei-1.xf-yun.com"
KEY = "fakeapikey0123456789abcdef01234567"
SECRET = "fakeApiSecretMjlmNzkzNmZk"
QUERY = Options()
HEADER = Options(mode="header-digest")
MODES: tuple[Literal["url-query"], Literal["header-digest"]] = ("url-query", "header-digest")


def sign(
    what: Request, options: Options = QUERY, now: float = NOW, key: str = KEY, secret: str = SECRET
) -> Signed:
    credentials = Credentials(api_key=Secret(key), api_secret=Secret(secret))
    return SCHEME.sign(what, credentials, options, now, "unused")


def request(
    method: str = "POST",
    host: str = HOST,
    path: str = "/",
    query: str = "",
    body: bytes | None = b"{}",
) -> Request:
    return Request(method, host, path, query, (), body)


def added(signed: Signed) -> dict[str, str]:
    assert signed.query is not None
    pairs = parse_qsl(signed.query, strict_parsing=True)
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def sdk_at(now: float) -> Any:
    """The SDK takes local time and turns it back into Unix seconds, by `mktime`."""
    return patch.object(sdk, "mktime", lambda _: now)


# Vectors


@pytest.mark.parametrize("vector", vectors_of("iflytek-hmac-sha256"), ids=lambda each: each["id"])
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    expected = vector["expected"]
    assert result["headers"] == expected.get("headers", {})
    steps = expected["intermediate"]
    assert {name: result["intermediate"][name] for name in steps} == steps
    assert result["url"] == expected.get("url", vector["request"]["url"])
    query = result["url"].partition("?")[2]
    assert parse_qsl(query) == list(expected.get("query", {}).items())


# Against the provider's SDK

TEXT = st.text(st.characters(codec="utf-8", exclude_characters='"\\\r\n\0'), max_size=40)
SEGMENTS = st.text(st.characters(codec="utf-8"), max_size=12).map(lambda text: quote(text, safe=""))
PATHS = st.lists(SEGMENTS, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts))
HOSTS = st.sampled_from([HOST, "spark-api.xf-yun.com", "127.0.0.1:8080", "[::1]:8080"])
METHODS = st.sampled_from(["GET", "POST", "PUT"])
TIMES = st.floats(min_value=0, max_value=4_000_000_000).map(lambda now: round(now, 3))


@settings(deadline=None, max_examples=150)
@given(METHODS, HOSTS, PATHS, TEXT, TEXT, TIMES)
@example("GET", HOST, "/", KEY, SECRET, NOW)
def test_sdk_signs_any_url_alike(
    method: str, host: str, path: str, key: str, secret: str, now: float
) -> None:
    with sdk_at(now):
        url = sdk.Signature.create_signed_url(f"https://{host}{path}", key, secret, method)
    signed = sign(request(method, host, path, body=None), QUERY, now, key, secret)
    assert f"https://{host}{path}?{signed.query}" == url
    assert list(added(signed)) == ["authorization", "host", "date"]
    assert signed.headers == {}


@settings(deadline=None, max_examples=150)
@given(METHODS, HOSTS, PATHS, TEXT, TEXT, TIMES, st.text(st.characters(codec="utf-8")))
@example("POST", HOST, "/v2/itr", KEY, SECRET, NOW, "")
@example("POST", HOST, "/v2/itr", KEY, SECRET, NOW, "é" * 512 * 1024)
def test_sdk_signs_any_body_alike(
    method: str, host: str, path: str, key: str, secret: str, now: float, body: str
) -> None:
    with sdk_at(now):
        theirs = sdk.Signature.get_digest_header(f"https://{host}{path}", key, secret, body, method)
    signed = sign(request(method, host, path, body=body.encode()), HEADER, now, key, secret)
    names = ("Host", "Date", "Digest", "Authorization")
    assert signed.headers == {name: theirs[name] for name in names}
    assert signed.query is None


@pytest.mark.parametrize(
    ("time", "date"),
    [
        ("2024-06-30T23:59:59.9999999+00:00", "Sun, 30 Jun 2024 23:59:59 GMT"),
        ("2024-07-01T00:00:00+00:00", "Mon, 01 Jul 2024 00:00:00 GMT"),
        ("2024-12-31T23:59:59.5+00:00", "Tue, 31 Dec 2024 23:59:59 GMT"),
        ("2024-02-29T00:00:00.001+00:00", "Thu, 29 Feb 2024 00:00:00 GMT"),
    ],
)
def test_date_is_that_of_the_second_that_runs(time: str, date: str) -> None:
    now = datetime.fromisoformat(time).timestamp()
    assert added(sign(request(), now=now))["date"] == date
    assert sign(request(), HEADER, now).headers["Date"] == date


@pytest.mark.parametrize("month", range(1, 13))
def test_names_of_days_and_months_are_english(month: int) -> None:
    for day in range(1, 8):
        moment = datetime(2025, month, day, 12, tzinfo=UTC)
        date = added(sign(request(), now=moment.timestamp()))["date"]
        assert parsedate_to_datetime(date) == moment
        assert date.isascii()


# What the SDK leaves to the client


def test_parameters_of_the_request_stay_and_are_not_signed() -> None:
    plain = sign(request())
    signed = sign(request(query="a=%7e&b=c+d&a=&flag"))
    assert signed.query == f"a=%7e&b=c+d&a=&flag&{plain.query}"
    assert signed.steps == plain.steps
    assert sign(request(query="a=1"), HEADER).headers == sign(request(), HEADER).headers


def test_parameters_are_written_as_a_form_writes_them() -> None:
    query = sign(request(host=f"{HOST}:8443")).query
    assert query is not None
    assert query.endswith(f"&host={HOST}%3A8443&date=Mon%2C+01+Jul+2024+08%3A00%3A00+GMT")
    assert "%20" not in query


def test_path_and_host_are_signed_as_they_are_on_the_wire() -> None:
    signed = sign(request(host=f"{HOST}:8443", path="/%e4%bd~%2F+/x"))
    assert signed.steps["string_to_sign"] == (
        f"host: {HOST}:8443\ndate: Mon, 01 Jul 2024 08:00:00 GMT\nPOST /%e4%bd~%2F+/x HTTP/1.1"
    )
    assert signed.steps["authorization_origin"] == (
        base64.b64decode(added(signed)["authorization"]).decode()
    )
    assert added(signed)["host"] == f"{HOST}:8443"


def test_bytes_that_are_no_text_are_hashed_as_they_are() -> None:
    body = bytes(range(256))
    signed = sign(request(body=body), HEADER)
    digest = base64.b64encode(sha256(body).digest()).decode()
    assert signed.headers["Digest"] == f"SHA-256={digest}"
    text = (
        f"host: {HOST}\ndate: Mon, 01 Jul 2024 08:00:00 GMT\nPOST / HTTP/1.1\n"
        f"digest: SHA-256={digest}"
    )
    signature = base64.b64encode(hmac.new(SECRET.encode(), text.encode(), "sha256").digest())
    assert f'signature="{signature.decode()}"' in signed.headers["Authorization"]


def test_body_is_held_only_when_it_is_signed() -> None:
    assert not SCHEME.needs_body(QUERY)
    assert SCHEME.needs_body(HEADER)
    assert sign(request(body=None)) == sign(request(body=b"1"))
    assert sign(request(body=b"1"), HEADER) != sign(request(body=b"2"), HEADER)


# What the caller sends of its own


@pytest.mark.parametrize("mode", MODES)
def test_caller_s_authorization_date_and_digest_do_not_survive(mode: str) -> None:
    vector = {
        "scheme": "iflytek-hmac-sha256",
        "credentials": {"api_key": KEY, "api_secret": SECRET},
        "options": {"mode": mode},
        "request": {"method": "POST", "url": f"https://{HOST}/v1", "body": "{}"},
    }
    plain = sign_vector(vector, now=NOW, nonce="")
    vector["request"]["headers"] = [  # type: ignore[index]
        ["Authorization", "hmac theirs"],
        ["DATE", "Thu, 01 Jan 1970 00:00:00 GMT"],
        ["X-Date", "Thu, 01 Jan 1970 00:00:00 GMT"],
        ["Digest", "SHA-256=theirs"],
    ]
    assert sign_vector(vector, now=NOW, nonce="") == plain


def test_caller_s_signature_in_the_query_is_replaced() -> None:
    theirs = "date=theirs&a=1&%61uthorization=theirs&host=theirs&date=again"
    assert sign(request(query=theirs)).query == sign(request(query="a=1")).query


@pytest.mark.parametrize("mode", MODES)
def test_each_try_is_signed_anew(mode: Literal["url-query", "header-digest"]) -> None:
    options = Options(mode=mode)
    first, second = sign(request(), options), sign(request(), options, NOW + 1)
    assert first.good_until == second.good_until == 0
    assert first.steps["authorization_origin"] != second.steps["authorization_origin"]
    assert (first.headers, first.query) != (second.headers, second.query)


# Settings


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValidationError, match="url-query"):
        Options(mode="header")  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ['hidden"', "hidden\\", "hidden\r\nx: y"])
def test_key_that_would_break_the_header_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValidationError, match="api_key") as caught:
        Credentials(api_key=Secret(key), api_secret=Secret("b"))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("first", [b"cannot be verified", b"does not match"])
def test_answer_to_a_clock_that_is_off_is_known(first: bytes) -> None:
    answer = (
        b'{"message":"HMAC signature %b, a valid date or x-date header is required for HMAC '
        b'Authentication"}'
    ) % first
    assert any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"message":"HMAC signature cannot be verified"}',
        b'{"message":"HMAC signature does not match"}',
        b'{"message":"HMAC signature cannot be verified: apikey not found"}',
        b'{"message":"Unauthorized"}',
    ],
)
def test_answer_to_a_wrong_key_is_not_taken_for_one(answer: bytes) -> None:
    assert not any(mark in answer for mark in SCHEME.expired)
