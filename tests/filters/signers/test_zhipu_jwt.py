"""Zhipu's tokens, held against those of the provider's SDK and read by plain means."""

from __future__ import annotations

import base64
import hmac
import json
import warnings
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.signers.scheme import Request, Signed
from filters.signers.vector import BadVector, sign_vector
from filters.signers.zhipu_jwt import SCHEME, Credentials, Options
from sidecar.api import Secret
from tests.support.vectors import vectors_of

NOW = 1719820800.0
KEY = "0123456789abcdef0123456789abcdef.FakeSecret000001"
REQUEST = Request("POST", "open.bigmodel.cn", "/api/paas/v4/chat/completions", "", (), b"{}")


def sign(key: str = KEY, now: float = NOW, **options: int) -> Signed:
    credentials = Credentials(api_key=Secret(key))
    return SCHEME.sign(REQUEST, credentials, Options(**options), now, "unused")


def read(value: str, secret: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and payload of the token in `Bearer TOKEN`, whose signature is good."""
    kind, token = value.split(" ")
    assert kind == "Bearer"
    assert "=" not in token
    signing_input, _, signature = token.rpartition(".")
    expected = hmac.new(secret.encode(), signing_input.encode(), "sha256").digest()
    assert hmac.compare_digest(decoded(signature), expected)
    header, payload = signing_input.split(".")
    return json.loads(decoded(header)), json.loads(decoded(payload))


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


@pytest.mark.parametrize("vector", vectors_of("zhipu-jwt-hs256"), ids=lambda each: each["id"])
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    expected = vector["expected"]
    assert result["headers"] == expected["headers"]
    assert result["intermediate"] == expected["intermediate"]
    assert result["url"] == vector["request"]["url"]
    secret = vector["credentials"]["api_key"].split(".")[1]
    header, payload = read(result["headers"]["Authorization"], secret)
    assert header == expected["jwt_header"]
    assert payload == expected["jwt_payload"]


PARTS = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=40)


@settings(deadline=None)
@given(PARTS, PARTS, st.integers(0, 4_000_000_000_000), st.integers(1000, 10_000_000))
def test_any_key_and_time_give_a_token_that_says_so(
    name: str, secret: str, now_ms: int, ttl_ms: int
) -> None:
    signed = sign(f"{name}.{secret}", now=now_ms / 1000, ttl_ms=ttl_ms)
    header, payload = read(signed.headers["Authorization"], secret)
    assert header == {"alg": "HS256", "sign_type": "SIGN", "typ": "JWT"}
    assert payload == {"api_key": name, "exp": now_ms + ttl_ms, "timestamp": now_ms}


def test_token_is_the_one_that_the_sdk_s_own_call_makes() -> None:
    """The SDK calls `jwt.encode`; a long key keeps PyJWT from warning of its length."""
    payload = {"api_key": "id", "exp": 1719821010000, "timestamp": 1719820800000}
    headers = {"alg": "HS256", "sign_type": "SIGN"}
    theirs = jwt.encode(payload, "s" * 32, algorithm="HS256", headers=headers)
    assert sign("id." + "s" * 32).headers == {"Authorization": f"Bearer {theirs}"}


@pytest.mark.parametrize(
    ("now", "timestamp"),
    [(1.0004, 1000), (1.0006, 1001), (1719820799.9996, 1719820800000), (0.0, 0)],
)
def test_time_is_rounded_to_the_nearest_millisecond(now: float, timestamp: int) -> None:
    _, payload = read(sign(now=now).headers["Authorization"], "FakeSecret000001")
    assert payload["timestamp"] == timestamp
    assert payload["exp"] == timestamp + 210_000


def test_token_is_replaced_thirty_seconds_before_its_end() -> None:
    assert sign().good_until == NOW + 180
    assert sign(ttl_ms=60_000).good_until == NOW + 30


def test_short_key_is_signed_with_and_no_warning_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sign("id.s")
    assert caught == []
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        jwt.encode({}, "short", algorithm="HS256")


def test_retry_after_the_token_s_end_has_another_token() -> None:
    assert sign().headers != sign(now=NOW + 181).headers


def test_caller_s_authorization_does_not_survive() -> None:
    assert "authorization" in SCHEME.own_headers
    assert list(sign().headers) == ["Authorization"]


def test_body_is_not_looked_at() -> None:
    assert not SCHEME.needs_body(Options())
    credentials = Credentials(api_key=Secret(KEY))
    assert SCHEME.sign(REQUEST._replace(body=None), credentials, Options(), NOW, "") == sign()


@pytest.mark.parametrize(
    "key",
    [
        *("", ".", "hidden", "hidden.", ".hidden", "hidden.a.b", "hidden..a"),
        "hidden.-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        'hidden.{"kty": "oct", "k": "AAAA"}',
    ],
)
def test_key_that_is_not_id_and_secret_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Credentials(api_key=Secret(key))
    for text in (str(caught.value), repr(caught.value)):
        assert "api_key" in text
        assert "hidden" not in text
        assert "AAAA" not in text


def test_refused_key_of_a_vector_is_not_shown_either() -> None:
    vector = {**vectors_of("zhipu-jwt-hs256")[0], "credentials": {"api_key": "hidden"}}
    with pytest.raises(BadVector, match=r"id\.secret") as caught:
        sign_vector(vector, now=NOW, nonce="")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("ttl_ms", [0, -1])
def test_token_that_is_over_at_once_is_refused(ttl_ms: int) -> None:
    with pytest.raises(ValidationError, match="ttl_ms"):
        Options(ttl_ms=ttl_ms)


@pytest.mark.parametrize(
    ("answer", "is_expired"),
    [
        ('{"error":{"code":"1003","message":"Authentication Token 已过期"}}', True),
        ('{"error": {"code": "1003", "message": "Authentication token expired"}}', True),
        ('{"error":{"code":"1002","message":"Authentication Token 非法"}}', False),
        ('{"error":{"code":"1113","message":"11003"}}', False),
    ],
)
def test_answer_to_a_clock_that_is_off_is_known(answer: str, is_expired: bool) -> None:
    assert any(mark in answer.encode() for mark in SCHEME.expired) == is_expired
