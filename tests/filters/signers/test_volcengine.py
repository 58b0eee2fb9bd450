"""Volcengine's signature, held against published examples and the provider's own signer."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qsl, quote, unquote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from volcengine.auth.SignerV4 import SignerV4
from volcengine.base.Request import Request as SdkRequest
from volcengine.Credentials import Credentials as SdkCredentials

from filters.signers.scheme import Request, Signed
from filters.signers.vector import sign_vector
from filters.signers.volcengine import SCHEME, Credentials, Options
from sidecar.api import Secret
from tests.support.vectors import vectors_of

NOW = datetime(2024, 7, 1, 8, 0, 0, tzinfo=UTC).timestamp()
HOST = "open.volcengineapi.com"
QUERY = "Action=GetApiKey&Version=2024-01-01"
KEY_ID = "fakeAKLTNTY3ODkwYWJjZGVm"
KEY = "fakeTVRJek5EVTJOemc5TUFiY2RlZg=="
OPTIONS = Options(region="cn-beijing", service="ark")
JSON = ("content-type", "application/json")


def credentials(token: str | None = None) -> Credentials:
    return Credentials(
        access_key_id=Secret(KEY_ID),
        secret_access_key=Secret(KEY),
        session_token=None if token is None else Secret(token),
    )


def request(
    *headers: tuple[str, str],
    method: str = "POST",
    host: str = HOST,
    path: str = "/",
    query: str = QUERY,
    body: bytes = b"{}",
) -> Request:
    return Request(method, host, path, query, headers or (JSON,), body)


def sign(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> Signed:
    return SCHEME.sign(what, credentials(token), options, now, "unused")


def canonical_lines(signed: Signed) -> list[str]:
    return signed.steps["canonical_request"].split("\n")


def sdk(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> dict[str, str]:
    """The headers that the SDK has after it signed. It wants all of the request decoded."""
    theirs = SdkRequest()
    theirs.set_method(what.method)
    theirs.set_path(unquote(what.path))
    theirs.set_body(what.body)
    query: dict[str, list[str]] = {}
    for name, value in parse_qsl(what.query, keep_blank_values=True):
        query.setdefault(name, []).append(value)
    theirs.set_query(query)
    # It finds what to sign by the case of names.
    headers = {name.title(): value for name, value in what.headers}
    theirs.set_headers({"Host": what.host, **headers})
    key = SdkCredentials(KEY_ID, KEY, options.service, options.region, token or "")
    date = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    with patch.object(SignerV4, "get_current_format_date", lambda: date):
        SignerV4.sign(theirs, key)
    return dict(theirs.headers)


def assert_sdk_agrees(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> None:
    theirs = sdk(what, token, options, now)
    signed = sign(what, token, options, now)
    assert {name: theirs[name] for name in signed.headers} == signed.headers
    assert ("X-Security-Token" in signed.headers) == bool(token)


def signature_of(canonical_request: bytes, date_time: str = "20240701T080000Z") -> str:
    """By plain means, for the default scope."""
    parts = [date_time[:8], "cn-beijing", "ark", "request"]
    hashed = sha256(canonical_request).hexdigest()
    text = f"HMAC-SHA256\n{date_time}\n{'/'.join(parts)}\n{hashed}"
    key = KEY.encode()
    for part in parts:
        key = hmac.new(key, part.encode(), "sha256").digest()
    return hmac.new(key, text.encode(), "sha256").hexdigest()


# Vectors


@pytest.mark.parametrize(
    "vector", vectors_of("volcengine-HMAC-SHA256"), ids=lambda each: each["id"]
)
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    assert result["headers"] == vector["expected"]["headers"]
    expected = vector["expected"]["intermediate"]
    assert {name: result["intermediate"][name] for name in expected} == expected
    assert result["url"] == vector["request"]["url"]


# Against the provider's signer

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PATHS = TEXT.map(lambda text: "/" + quote(text, safe="")) | TEXT.map(
    lambda text: "/" + quote(text, safe="/~!$&'()*+,;=:@")
)
PAIRS = st.lists(st.tuples(TEXT.filter(bool), TEXT), max_size=5)
VALUES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=20)
NAMES = st.one_of(
    st.sampled_from(["content-md5", "accept", "user-agent", "traceparent"]),
    st.from_regex(r"x-[a-z]{1,8}", fullmatch=True).filter(lambda name: name != "x-date"),
)
TYPES = st.sampled_from([(), (JSON,), (("content-type", ""),)])
HEADERS = st.builds(
    lambda types, headers: (*types, *headers.items()),
    TYPES,
    st.dictionaries(NAMES, VALUES, max_size=5),
)
TOKENS = st.none() | st.text("ABCxyz019+/=", min_size=1, max_size=40)
SCOPES = st.builds(
    Options,
    region=st.sampled_from(["cn-beijing", "cn-north-1", "ap-southeast-1"]),
    service=st.sampled_from(["ark", "iam", "billing"]),
)
HOSTS = st.sampled_from([HOST, f"{HOST}:443", f"{HOST}:80", f"{HOST}:8443", "127.0.0.1:8080"])
TIMES = st.floats(min_value=0, max_value=4_000_000_000).map(lambda now: round(now, 3))


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    HOSTS,
    PATHS,
    PAIRS,
    HEADERS,
    st.binary(max_size=64),
    TOKENS,
    SCOPES,
    TIMES,
)
@example("GET", HOST, "/", [], (JSON,), b"", None, OPTIONS, NOW)
def test_sdk_signs_any_request_alike(
    method: str,
    host: str,
    path: str,
    pairs: list[tuple[str, str]],
    headers: tuple[tuple[str, str], ...],
    body: bytes,
    token: str | None,
    options: Options,
    now: float,
) -> None:
    # The SDK sorts names as they are, the documentation once they are encoded.
    names = sorted(name for name, _ in pairs)
    encoded_names = [quote(name, safe="") for name in names]
    assume(encoded_names == sorted(encoded_names))
    query = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs)
    assert_sdk_agrees(Request(method, host, path, query, headers, body), token, options, now)


CASES = {
    "plain": request(),
    "path in UTF-8": request(path="/%E4%BD%A0%E5%A5%BD/~x/a%2Bb"),
    "encoded slash": request(path="/a%2Fb%2f%2Fc"),
    "no content type": request(("accept", "*/*")),
    "no content type of a GET": request(("accept", "*/*"), method="GET", body=b""),
    "repeated parameters in their order": request(query="b=2&a=2&b=1&a=&a=1"),
    "empty parameters": request(query="flag&other="),
    "encoded parameters": request(query="a-b=1&z=~%7E&a.b=2&A=%20%2B%26%3D&a=%E4%BD%A0"),
    "other port": request(host="localhost:8000"),
    "default port": request(host=f"{HOST}:443"),
    "no body": request(method="GET", body=b""),
    "large body": request(body=b"\x00\xff" * 512 * 1024),
    "hash of the body besides": request(JSON, ("content-md5", "1B2M2Y8AsgTpgAmY7PhCfg==")),
    "unsigned headers": request(JSON, ("accept", "*/*"), ("user-agent", "a"), ("date", "b")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("token", [None, "STSeyJMVEFjY2Vzc0tleUlk+/=="], ids=["", "token"])
def test_sdk_signs_alike(case: str, token: str | None) -> None:
    assert_sdk_agrees(CASES[case], token)


@pytest.mark.parametrize(
    ("time", "date_time"),
    [
        ("2024-06-30T23:59:59.999+00:00", "20240630T235959Z"),
        ("2024-07-01T00:00:00+00:00", "20240701T000000Z"),
        ("2024-12-31T23:59:59.5+00:00", "20241231T235959Z"),
        ("2024-02-29T00:00:00.001+00:00", "20240229T000000Z"),
    ],
)
def test_date_of_scope_and_header_are_of_one_moment(time: str, date_time: str) -> None:
    now = datetime.fromisoformat(time).timestamp()
    headers = sign(request(), now=now).headers
    assert headers["X-Date"] == date_time
    assert (
        f"Credential={KEY_ID}/{date_time[:8]}/cn-beijing/ark/request," in headers["Authorization"]
    )
    assert_sdk_agrees(request(), now=now)


# What the SDK does otherwise, or leaves to the client


def test_parameters_are_sorted_as_they_are_encoded() -> None:
    """By the documentation. The SDK sorts first: `a`, `a[`, `ab`, `aé`."""
    signed = sign(request(query="ab=1&a%C3%A9=2&a%5B=3&a=4"))
    assert canonical_lines(signed)[2] == "a=4&a%5B=3&a%C3%A9=2&ab=1"


def test_spelling_of_path_and_query_does_not_matter() -> None:
    plain = sign(request(path="/a~/b%20c", query="a%20b=%7Ec%2Fd&e=")).headers
    assert sign(request(path="/%61%7e/b%20c", query="&a+b=~c/d&&e")).headers == plain


@pytest.mark.parametrize("path", ["/a%2fb/c", "/a%2Fb%2Fc", "%2Fa/b/c"])
def test_encoded_slash_is_signed_as_a_slash(path: str) -> None:
    assert canonical_lines(sign(request(path=path)))[1] == "/a/b/c"


def test_repeated_and_padded_headers_are_signed_as_one_trimmed_value() -> None:
    signed = sign(request(JSON, ("x-a", "  2\t"), ("x-b", ""), ("x-a", " 1  0 ")))
    hashed = sha256(b"{}").hexdigest()
    canonical_request = (
        f"POST\n/\n{QUERY}\ncontent-type:application/json\nhost:{HOST}\nx-a:2,1  0\nx-b:\n"
        f"x-content-sha256:{hashed}\nx-date:20240701T080000Z\n\n"
        f"content-type;host;x-a;x-b;x-content-sha256;x-date\n{hashed}"
    )
    assert signed.steps["canonical_request"] == canonical_request
    signature = signature_of(canonical_request.encode())
    assert signed.headers["Authorization"].endswith(f"Signature={signature}")


def test_bytes_that_are_no_text_are_signed_as_they_are() -> None:
    value = b"caf\xe9\xa0".decode(errors="surrogateescape")
    signed = sign(request(("x-a", value), method="GET", path="/%FF", query="a=%FF&%FE="))
    hashed = sha256(b"{}").hexdigest().encode()
    canonical_request = (
        b"GET\n/%FF\n%FE=&a=%FF\nhost:" + HOST.encode() + b"\nx-a:caf\xe9\xa0\n"
        b"x-content-sha256:" + hashed + b"\nx-date:20240701T080000Z\n\n"
        b"host;x-a;x-content-sha256;x-date\n" + hashed
    )
    signature = signature_of(canonical_request)
    assert signed.headers["Authorization"].endswith(f"Signature={signature}")


@pytest.mark.parametrize("host", [HOST, f"{HOST}:443", f"{HOST}:80"])
def test_default_port_is_not_signed(host: str) -> None:
    assert f"host:{HOST}" in canonical_lines(sign(request(host=host)))


def test_session_token_is_sent_and_signed() -> None:
    signed = sign(request(), token="STS/token==")
    assert signed.headers["X-Security-Token"] == "STS/token=="
    assert "x-security-token:STS/token==" in canonical_lines(signed)
    assert ";x-date;x-security-token," in signed.headers["Authorization"]


# Which headers


def test_only_the_chosen_headers_are_signed_as_far_as_they_are_there() -> None:
    options = Options(
        region="cn-beijing",
        service="ark",
        signed_headers=["X-Date", "host", "content-type", "accept", "host"],
    )
    signed = sign(request(JSON, ("x-a", "1")), token="token", options=options)
    assert "SignedHeaders=content-type;host;x-date, " in signed.headers["Authorization"]
    assert set(signed.headers) == {
        *("Authorization", "X-Content-Sha256", "X-Date", "X-Security-Token")
    }


BARE = ("accept", "*/*")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "HEAD"])
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_content_type_of_the_sdks_is_sent_and_signed_where_there_is_none(
    method: str, body: bytes
) -> None:
    signed = sign(request(BARE, method=method, body=body))
    content_type = "application/x-www-form-urlencoded; charset=utf-8"
    assert signed.headers["Content-Type"] == content_type
    assert f"content-type:{content_type}" in canonical_lines(signed)
    assert "SignedHeaders=content-type;host;" in signed.headers["Authorization"]


def test_content_type_of_a_get_is_not_made_up() -> None:
    signed = sign(request(BARE, method="GET"))
    assert "Content-Type" not in signed.headers
    assert "SignedHeaders=host;x-content-sha256;x-date, " in signed.headers["Authorization"]


@pytest.mark.parametrize("sent", ["text/plain", ""])
def test_content_type_of_the_caller_stays(sent: str) -> None:
    signed = sign(request(("content-type", sent)))
    assert "Content-Type" not in signed.headers
    assert f"content-type:{sent}" in canonical_lines(signed)


@pytest.mark.parametrize("listed", [["host", "x-date"], ["content-type", "host", "x-date"]])
def test_content_type_is_not_made_up_where_the_signed_headers_are_chosen(listed: list[str]) -> None:
    options = Options(region="cn-beijing", service="ark", signed_headers=listed)
    signed = sign(request(BARE), options=options)
    assert "Content-Type" not in signed.headers
    assert "SignedHeaders=host;x-date, " in signed.headers["Authorization"]


def test_hash_of_the_body_is_signed_without_its_header() -> None:
    options = Options(region="cn-beijing", service="ark", add_content_sha256_header=False)
    signed = sign(request(), options=options)
    assert set(signed.headers) == {"X-Date", "Authorization"}
    assert "SignedHeaders=content-type;host;x-date, " in signed.headers["Authorization"]
    assert canonical_lines(signed)[-1] == sha256(b"{}").hexdigest()


# What the caller sends of its own


def test_caller_s_authorization_date_hash_and_token_do_not_survive() -> None:
    vector = {
        "scheme": "volcengine-HMAC-SHA256",
        "credentials": {"access_key_id": KEY_ID, "secret_access_key": KEY},
        "options": {"region": "cn-beijing", "service": "ark"},
        "request": {"method": "POST", "url": f"https://{HOST}/?{QUERY}", "body": "{}"},
    }
    plain = sign_vector(vector, now=NOW, nonce="")
    vector["request"]["headers"] = [  # type: ignore[index]
        ["Authorization", "Bearer theirs"],
        ["X-DATE", "19700101T000000Z"],
        ["X-Content-Sha256", "theirs"],
        ["x-security-token", "theirs"],
    ]
    assert sign_vector(vector, now=NOW, nonce="") == plain


def test_each_try_is_signed_anew() -> None:
    first, second = sign(request()), sign(request(), now=NOW + 1)
    assert first.good_until == second.good_until == 0
    assert first.headers["Authorization"] != second.headers["Authorization"]


def test_body_is_part_of_the_signature() -> None:
    assert SCHEME.needs_body(OPTIONS)
    assert sign(request(body=b"1")).headers != sign(request(body=b"2")).headers


# Settings


@pytest.mark.parametrize("field", ["region", "service"])
@pytest.mark.parametrize("value", ["", "cn beijing", "cn/beijing", "cn-beijing\n"])
def test_scope_that_would_break_the_signature_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Options(**{"region": "cn-beijing", "service": "ark", field: value})


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["x-date"], "add `host`"),
        (["host"], "add `x-date`"),
        ([], "add `host`"),
        (["host", "x-date", "Authorization"], "take `authorization` out"),
        (["host", "x-date", "x;y"], "no header name"),
        (["host", "x-date", "connection"], "set for each message"),
    ],
)
def test_signed_headers_that_cannot_work_are_refused(names: list[str], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Options(region="cn-beijing", service="ark", signed_headers=names)


def test_answer_to_a_clock_that_is_off_is_known() -> None:
    answer = (
        b'{"ResponseMetadata":{"RequestId":"1","Error":{"CodeN":100006,"Code":"InvalidTimestamp",'
        b'"Message":"The signature of the request is expired."}}}'
    )
    assert any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize(
    "code", [b"SignatureDoesNotMatch", b"InvalidAccessKey", b"InvalidSecretToken", b"AccessDenied"]
)
def test_answer_to_a_wrong_key_is_not_taken_for_one(code: bytes) -> None:
    answer = b'{"ResponseMetadata":{"RequestId":"1","Error":{"Code":"%b"}}}' % code
    assert not any(mark in answer for mark in SCHEME.expired)
