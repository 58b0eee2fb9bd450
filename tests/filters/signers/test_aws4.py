"""AWS Signature Version 4, held against the test suite's vectors and botocore's own signer."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.signers.aws4 import NEVER_SIGNED, SCHEME, Credentials, Options
from filters.signers.scheme import Request, Signed
from filters.signers.vector import sign_vector
from sidecar.api import Secret
from tests.support.vectors import vectors_of

NOW = datetime(2024, 7, 1, 8, 0, 0, tzinfo=UTC).timestamp()
HOST = "bedrock-runtime.us-east-1.amazonaws.com"
PATH = "/model/anthropic.claude-3-sonnet-20240229-v1%3A0/invoke"
KEY_ID = "AKIDEXAMPLE"
KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
OPTIONS = Options(region="us-east-1")


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
    path: str = PATH,
    query: str = "",
    body: bytes = b"{}",
    url_scheme: str = "https",
) -> Request:
    return Request(method, host, path, query, headers, body, url_scheme)


def sign(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> Signed:
    return SCHEME.sign(what, credentials(token), options, now, "unused")


class Recorder(SigV4Auth):
    """Keeps what it signed: asked later, the canonical request would hold the signature too."""

    canonical = ""

    def string_to_sign(self, request: AWSRequest, canonical_request: str) -> str:
        self.canonical = canonical_request
        found: str = super().string_to_sign(request, canonical_request)
        return found


def botocore(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> tuple[dict[str, str], str]:
    """The headers that botocore has, in lower case, after it signed; and the canonical request."""
    url = f"{what.url_scheme}://{what.host}{what.path}" + (f"?{what.query}" if what.query else "")
    theirs = AWSRequest(method=what.method, url=url, data=what.body)
    for name, value in what.headers:
        theirs.headers.add_header(name, value)
    signer = Recorder(BotoCredentials(KEY_ID, KEY, token), options.service, options.region)
    clock = datetime.fromtimestamp(now, UTC)
    with patch("botocore.auth.get_current_datetime", lambda: clock):
        signer.add_auth(theirs)
    headers = {name.lower(): value for name, value in theirs.headers.items()}
    return headers, signer.canonical


def assert_botocore_agrees(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> None:
    headers, canonical_request = botocore(what, token, options, now)
    signed = sign(what, token, options, now)
    assert signed.steps["canonical_request"] == canonical_request
    for name, value in signed.headers.items():
        assert headers[name.lower()] == value
    assert ("X-Amz-Security-Token" in signed.headers) == bool(token)


# Vectors


@pytest.mark.parametrize("vector", vectors_of("AWS4-HMAC-SHA256"), ids=lambda each: each["id"])
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    assert result["headers"] == vector["expected"]["headers"]
    assert result["intermediate"] == vector["expected"]["intermediate"]
    assert result["url"] == vector["request"]["url"]


# Against botocore

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)
SEGMENTS = st.one_of(
    TEXT.map(lambda text: quote(text, safe="")),
    TEXT.map(lambda text: quote(text, safe="~!$&'()*+,;=:@")),
    st.sampled_from(["", ".", "..", "%2F", "%2E%2E", "~a", "%7Ea", "v1:0", "v1%3A0", "a+b"]),
)
PATHS = st.lists(SEGMENTS, max_size=6).map(lambda segments: "/" + "/".join(segments))
# Encoded as botocore's own clients encode it: it signs a query as it stands.
QUERIES = st.lists(st.tuples(TEXT, TEXT), max_size=5).map(
    lambda pairs: "&".join(
        f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs
    )
)
VALUES = st.text(
    # `str.split`, which botocore trims with, takes more than HTTP does for white space.
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]) | st.just(" "),
    max_size=20,
)
NAMES = st.one_of(
    st.sampled_from(["content-type", "x-amzn-bedrock-accept", "accept", "x-a", "x-b", "x-a-b"]),
    st.sampled_from(sorted(NEVER_SIGNED - {"authorization"})),
    st.from_regex(r"x-[a-z0-9_.-]{1,10}", fullmatch=True).filter(lambda name: "amz" not in name),
)
REQUESTS = st.builds(
    Request,
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    host=st.sampled_from(
        [HOST, f"{HOST}:443", f"{HOST}:80", f"{HOST}:8443", "127.0.0.1:8080", "[::1]:8080"]
    ),
    path=PATHS,
    query=QUERIES,
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=6).map(tuple),
    body=st.binary(max_size=64),
    url_scheme=st.sampled_from(["https", "http"]),
)
TOKENS = st.none() | st.text("ABCxyz019+/=", min_size=1, max_size=40)
SCOPES = st.builds(
    Options,
    region=st.sampled_from(["us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1"]),
    service=st.sampled_from(["bedrock", "bedrock-mantle", "sagemaker"]),
)
TIMES = st.floats(min_value=0, max_value=4_000_000_000).map(lambda now: round(now, 3))


@settings(deadline=None, max_examples=250)
@given(REQUESTS, TOKENS, SCOPES, TIMES)
@example(request(path="/", query="", body=b""), None, OPTIONS, NOW)
def test_botocore_signs_any_request_alike(
    what: Request, token: str | None, options: Options, now: float
) -> None:
    assert_botocore_agrees(what, token, options, now)


CASES = {
    "repeated headers in their order": request(("x-a", "2"), ("x-b", "3"), ("x-a", "1")),
    "empty values": request(("x-a", ""), ("x-a", "  ")),
    "padded values": request(("x-a", "  one   two\t three  ")),
    "values in UTF-8": request(("x-a", "é漢😀")),
    "dot segments": request(path="/a/./b/../c//d/"),
    "above the root": request(path="/.."),
    "path in UTF-8": request(path="/%E4%BD%A0%E5%A5%BD/~x/%7Ey"),
    "encoded slash": request(path="/model/arn%3Aaws%3Abedrock%3A%3A%3Amodel%2Fx/converse"),
    "literal colon": request(path="/model/amazon.nova-lite-v1:0/converse"),
    "repeated parameters": request(query="b=2&a=2&b=1&a=&a=1"),
    "empty parameters": request(query="flag&other="),
    "encoded parameters": request(
        query="%E4%BD%A0=%20%2B%26%3D&a-b=1&a.b=2&a_b=3&a~b=4&A=5&a=6&%C3%A9=7"
    ),
    "bytes that are no text": request(path="/%FF", query="a=%FF%E4&%FE="),
    "default port": request(host=f"{HOST}:443"),
    "default port of http": request(host=f"{HOST}:80", url_scheme="http"),
    "the other's default port": request(host=f"{HOST}:80"),
    "other port": request(host="localhost:8000"),
    "no body": request(method="GET", body=b""),
    "large body": request(body=b"\x00\xff" * 512 * 1024),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("token", [None, "FwoGZXIvYXdzEFAKE/token+=="], ids=["", "token"])
def test_botocore_signs_alike(case: str, token: str | None) -> None:
    assert_botocore_agrees(CASES[case], token)


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
    assert headers["X-Amz-Date"] == date_time
    assert f"Credential={KEY_ID}/{date_time[:8]}/us-east-1/bedrock/" in headers["Authorization"]
    assert_botocore_agrees(request(), now=now)


# What botocore does otherwise, or leaves to the client


def test_spelling_of_the_query_does_not_matter() -> None:
    """AWS: names and values are encoded in one way, whatever the wire has; `+` is a space there."""
    plain = sign(request(query="a%20b=%7Ec%2Fd&e=")).headers
    assert sign(request(query="a+b=~c/d&e")).headers == plain
    assert sign(request(query="&a%20b=%7ec%2fd&&e=")).headers == plain


def test_encoded_slash_stays_one_and_is_encoded_once_more() -> None:
    lines = sign(request(path="/model/a%2Fb/c")).steps["canonical_request"].split("\n")
    assert lines[1] == "/model/a%252Fb/c"


def test_white_space_is_that_of_ascii_alone() -> None:
    """`str.split` of botocore would take a no-break space for one too."""
    lines = sign(request(("x-a", "a\u00a0\u00a0b \t c"))).steps["canonical_request"].split("\n")
    assert "x-a:a\u00a0\u00a0b c" in lines


def test_bytes_that_are_no_text_are_signed_as_they_are() -> None:
    value = b"caf\xe9  \xff".decode(errors="surrogateescape")
    signed = sign(request(("x-a", value)))
    canonical_request = (
        f"POST\n{quote(PATH)}\n\n".encode()
        + b"host:%b\nx-a:caf\xe9 \xff\nx-amz-date:20240701T080000Z\n\n" % HOST.encode()
        + b"host;x-a;x-amz-date\n%b" % sha256(b"{}").hexdigest().encode()
    )
    scope = "20240701/us-east-1/bedrock/aws4_request"
    text = f"AWS4-HMAC-SHA256\n20240701T080000Z\n{scope}\n{sha256(canonical_request).hexdigest()}"
    key = b"AWS4" + KEY.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), "sha256").digest()
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    assert signed.headers["Authorization"].endswith(f"Signature={signature}")


@pytest.mark.parametrize("sent", ["UNSIGNED-PAYLOAD", "0" * 64, sha256(b"{}").hexdigest(), ""])
def test_body_hash_that_the_caller_sends_is_made_true_and_signed(sent: str) -> None:
    true = sha256(b"{}").hexdigest()
    signed = sign(request(("x-amz-content-sha256", sent)))
    assert signed.headers["X-Amz-Content-SHA256"] == true
    headers, canonical_request = botocore(request(("x-amz-content-sha256", true)))
    assert signed.steps["canonical_request"] == canonical_request
    assert signed.headers["Authorization"] == headers["authorization"]


def test_body_hash_is_no_header_unless_the_caller_sends_it() -> None:
    assert set(sign(request()).headers) == {"X-Amz-Date", "Authorization"}


@pytest.mark.parametrize(
    ("url_scheme", "host", "signed_host"),
    [
        ("https", HOST, HOST),
        ("https", f"{HOST}:443", HOST),
        ("https", f"{HOST}:80", f"{HOST}:80"),
        ("https", f"{HOST}:8443", f"{HOST}:8443"),
        ("http", HOST, HOST),
        ("http", f"{HOST}:80", HOST),
        ("http", f"{HOST}:443", f"{HOST}:443"),
        ("http", f"{HOST}:8080", f"{HOST}:8080"),
    ],
)
def test_port_is_signed_unless_it_is_the_default_of_the_url_s_scheme(
    url_scheme: str, host: str, signed_host: str
) -> None:
    what = request(host=host, url_scheme=url_scheme)
    assert f"host:{signed_host}" in sign(what).steps["canonical_request"].split("\n")


@pytest.mark.parametrize("host", [f"{HOST}:443", f"{HOST}:80"])
@pytest.mark.parametrize("url_scheme", ["https", "http", "wss", "ws"])
def test_url_says_which_port_is_the_default(url_scheme: str, host: str) -> None:
    vector = {
        "scheme": "AWS4-HMAC-SHA256",
        "credentials": {"access_key_id": KEY_ID, "secret_access_key": KEY},
        "options": {"region": "us-east-1"},
        "request": {"method": "GET", "url": f"{url_scheme}://{host}/"},
    }
    canonical_request = sign_vector(vector, now=NOW, nonce="")["intermediate"]["canonical_request"]
    is_default = host.endswith(":443") == (url_scheme in ("https", "wss"))
    assert f"host:{HOST if is_default else host}" in canonical_request.split("\n")


@pytest.mark.parametrize("name", sorted(NEVER_SIGNED))
def test_header_that_proxies_rewrite_is_not_signed(name: str) -> None:
    with_it = request(("content-type", "a"), (name, "b"))
    assert sign(with_it) == sign(request(("content-type", "a")))


# What the caller sends of its own


def test_caller_s_authorization_date_and_token_do_not_survive() -> None:
    vector = {
        "scheme": "AWS4-HMAC-SHA256",
        "credentials": {"access_key_id": KEY_ID, "secret_access_key": KEY},
        "options": {"region": "us-east-1"},
        "request": {"method": "POST", "url": f"https://{HOST}{PATH}", "body": "{}"},
    }
    plain = sign_vector(vector, now=NOW, nonce="")
    vector["request"]["headers"] = [  # type: ignore[index]
        ["Authorization", "AWS4-HMAC-SHA256 Credential=theirs"],
        ["Date", "Thu, 01 Jan 1970 00:00:00 GMT"],
        ["X-AMZ-Date", "19700101T000000Z"],
        ["X-Amz-Security-Token", "theirs"],
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


@pytest.mark.parametrize("region", ["", "us east", "us-east-1/", "us-east-1\n"])
def test_region_that_would_break_the_scope_is_refused(region: str) -> None:
    with pytest.raises(ValidationError, match="region"):
        Options(region=region)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"message":"Signature expired: 20240701T074000Z is now earlier than 20240701T075500Z '
        b'(20240701T080000Z - 5 min.)"}',
        b'{"message":"Signature not yet current: 20240701T082000Z is still later than '
        b'20240701T080500Z (20240701T080000Z + 5 min.)"}',
        b"<Error><Code>RequestTimeTooSkewed</Code></Error>",
        b'{"__type":"com.amazon.coral.service#RequestExpired"}',
    ],
)
def test_answer_to_a_clock_that_is_off_is_known(answer: bytes) -> None:
    assert any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"__type":"InvalidSignatureException","message":"The request signature we calculated '
        b'does not match the signature you provided."}',
        b'{"message":"The security token included in the request is expired"}',
    ],
)
def test_answer_to_a_wrong_key_or_an_old_token_is_not_taken_for_one(answer: bytes) -> None:
    assert not any(mark in answer for mark in SCHEME.expired)
