"""Alibaba Cloud's signature V3, held against the published example and the provider's own SDK."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from unittest.mock import patch
from urllib.parse import quote, quote_plus, unquote, urlencode

import pytest
from alibabacloud_tea_openapi.client import Client
from alibabacloud_tea_openapi.models import Config, OpenApiRequest, Params
from alibabacloud_tea_openapi.utils import Utils
from darabonba.exceptions import UnretryableException
from darabonba.request import DaraRequest
from darabonba.runtime import RuntimeOptions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.signers.acs3 import SCHEME, Credentials, Options
from filters.signers.scheme import CannotSign, Request, Signed
from filters.signers.vector import sign_vector
from sidecar.api import Secret
from tests.support.vectors import vectors_of

NOW = datetime(2024, 7, 1, 8, 0, 0, tzinfo=UTC).timestamp()
DATE = "2024-07-01T08:00:00Z"
HOST = "bailian.cn-beijing.aliyuncs.com"
PATH = "/llm-3shx2gu255oqxxxx/index/list_indices"
KEY_ID = "fakeLTAI5tFakeKeyId000001"
KEY = "fakeAliSecret000000000000000001"
STS = "CAISfake/token+0=="
NONCE = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
OPTIONS = Options(action="ListIndices", version="2023-12-29")
EMPTY_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def request(
    *headers: tuple[str, str],
    method: str = "POST",
    host: str = HOST,
    path: str = PATH,
    query: str = "",
    body: bytes = b"{}",
) -> Request:
    return Request(method, host, path, query, headers, body)


def sign(
    what: Request,
    token: str | None = None,
    options: Options = OPTIONS,
    now: float = NOW,
    nonce: str = NONCE,
) -> Signed:
    credentials = Credentials(
        access_key_id=Secret(KEY_ID),
        access_key_secret=Secret(KEY),
        security_token=None if token is None else Secret(token),
    )
    return SCHEME.sign(what, credentials, options, now, nonce)


def sdk_authorization(
    method: str, path: str, query: dict[str, str], headers: Any, body: str
) -> str:
    """What the SDK makes of a request whose path is encoded, and whose query is not."""
    theirs = DaraRequest()
    theirs.method, theirs.pathname, theirs.query, theirs.headers = method, path, query, headers
    found: str = Utils.get_authorization(theirs, "ACS3-HMAC-SHA256", body, KEY_ID, KEY)
    return found


def assert_sdk_agrees(
    what: Request, path: str, query: dict[str, str], token: str | None = None, now: float = NOW
) -> None:
    """`path` and `query` are those of `what`, decoded."""
    signed = sign(what, token, now=now)
    headers = {"host": what.host}
    for index, (name, value) in enumerate(what.headers):
        if name == "content-type" or name.startswith("x-acs-"):
            # The SDK holds headers in a dict, and joins those that differ in case alone.
            headers[spelled(name, index)] = value
    mine = {name: value for name, value in signed.headers.items() if name != "Authorization"}
    body_hash = sha256(what.body or b"").hexdigest()
    theirs = sdk_authorization(
        what.method, Utils.get_encode_path(path), query, headers | mine, body_hash
    )
    assert signed.headers["Authorization"] == theirs
    expected = {
        "x-acs-action": "ListIndices",
        "x-acs-version": "2023-12-29",
        "x-acs-date": datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "x-acs-signature-nonce": NONCE,
        "x-acs-content-sha256": body_hash,
    }
    if token is not None:
        expected |= {"x-acs-security-token": token}
    assert mine == expected


def spelled(name: str, number: int) -> str:
    """`name` in a spelling of its own for each number up to the letters' number of spellings."""
    letters = [index for index, letter in enumerate(name) if letter.isalpha()]
    upper = {index for bit, index in enumerate(letters) if number >> bit & 1}
    return "".join(each.upper() if at in upper else each for at, each in enumerate(name))


def plain(
    canonical_query: str = "",
    lines: tuple[bytes, ...] = (),
    path: str = PATH,
    body: bytes = b"{}",
    host: str = HOST,
) -> str:
    """`Authorization` by the document's words; `lines` are those that `request` adds."""
    body_hash = sha256(body).hexdigest().encode()
    every = sorted(
        [
            b"host:" + host.encode(),
            b"x-acs-action:ListIndices",
            b"x-acs-content-sha256:" + body_hash,
            b"x-acs-date:" + DATE.encode(),
            b"x-acs-signature-nonce:" + NONCE.encode(),
            b"x-acs-version:2023-12-29",
            *lines,
        ]
    )
    names = b";".join(line.partition(b":")[0] for line in every)
    head = f"POST\n{path}\n{canonical_query}\n".encode()
    canonical = head + b"".join(b"%b\n" % line for line in every)
    canonical += b"\n%b\n%b" % (names, body_hash)
    text = f"ACS3-HMAC-SHA256\n{sha256(canonical).hexdigest()}"
    signature = hmac.new(KEY.encode(), text.encode(), "sha256").hexdigest()
    return (
        f"ACS3-HMAC-SHA256 Credential={KEY_ID},SignedHeaders={names.decode()},Signature={signature}"
    )


# Vectors


@pytest.mark.parametrize("vector", vectors_of("ACS3-HMAC-SHA256"), ids=lambda each: each["id"])
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    assert result["headers"] == vector["expected"]["headers"]
    assert result["intermediate"] == vector["expected"]["intermediate"]
    assert result["url"] == vector["request"]["url"]


# Against the SDK

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)
SEGMENTS = TEXT.map(lambda text: text.replace("/", "_")) | st.sampled_from(["", ".", "a:b", "~a"])
PATHS = st.lists(SEGMENTS, max_size=5).map(lambda segments: "/" + "/".join(segments))
# The SDK does not encode names, so they are of letters that need none; see below for the others.
NAMES = st.text("AZaz09-_.~", min_size=1, max_size=8)
QUERIES = st.lists(st.tuples(NAMES, TEXT), max_size=5, unique_by=lambda pair: pair[0])
VALUES = st.text(
    # `str.strip` of the SDK takes more than HTTP does for white space.
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]) | st.just(" "),
    max_size=20,
)
HEADER_NAMES = st.one_of(
    st.sampled_from(["content-type", "accept", "user-agent", "x-other", "x-acs-region-id"]),
    st.from_regex(r"x-acs-[a-z]{3,6}", fullmatch=True).filter(
        lambda name: name not in SCHEME.own_headers and name not in ("x-acs-action",)
    ),
)
HEADERS = st.lists(st.tuples(HEADER_NAMES, VALUES), max_size=6)
HOSTS = st.sampled_from([HOST, f"{HOST}:443", f"{HOST}:8443", "127.0.0.1:8080", "[::1]:8080"])
TIMES = st.floats(min_value=0, max_value=4_000_000_000).map(lambda now: round(now, 3))
TOKENS = st.none() | st.text("ABCxyz019+/=", min_size=1, max_size=40)
SPELLINGS = st.sampled_from(
    [
        lambda text: quote(text, safe=""),
        lambda text: quote(text, safe="~!$'()*,;:@/?"),
        quote_plus,
    ]
)


@settings(deadline=None, max_examples=250)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    host=HOSTS,
    path=PATHS,
    query=QUERIES,
    spelling=SPELLINGS,
    headers=HEADERS,
    body=st.binary(max_size=64),
    token=TOKENS,
    now=TIMES,
)
@example("POST", HOST, "/", [], quote, [("x-acs-a", "b"), ("x-acs-a", "a")], b"", None, NOW)
def test_sdk_signs_any_request_alike(
    method: str,
    host: str,
    path: str,
    query: list[tuple[str, str]],
    spelling: Any,
    headers: list[tuple[str, str]],
    body: bytes,
    token: str | None,
    now: float,
) -> None:
    wire_query = "&".join(f"{name}={spelling(value)}" for name, value in query)
    wire_path = quote(path, safe="/~:!$&'()*+,;=@")
    what = Request(method, host, wire_path, wire_query, tuple(headers), body)
    assert_sdk_agrees(what, path, dict(query), token, now)


CASES = {
    "repeated headers": request(("x-acs-b", "2"), ("x-acs-a", "3"), ("x-acs-b", "1")),
    "padded values": request(("x-acs-a", "  one   two\t three \t"), ("content-type", " a/b ")),
    "empty values": request(("x-acs-a", ""), ("x-acs-b", "  "), ("content-type", "")),
    "values in UTF-8": request(("x-acs-a", "é漢😀")),
    "content type": request(("content-type", "application/json; charset=utf-8")),
    "path in UTF-8": request(path="/%E4%BD%A0%E5%A5%BD/~x/a%20b"),
    "root": request(path="/"),
    "slash at the end": request(path="/a//b/"),
    "encoded slash": request(path="/a%2Fb%2f%2Fc"),
    "empty parameters": request(query="b=&a=&c=1"),
    "flattened array": request(query="Key.1=a&Key.2=b&Key.10=c"),
    "values to encode": request(query="a=%E4%BD%A0%20%2B%26%3D%7E*&b=%2f%3A"),
    "other port": request(host="localhost:8000"),
    "no body": request(method="GET", body=b""),
    "large body": request(body=b"\x00\xff" * 512 * 1024),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("token", [None, STS], ids=["", "token"])
def test_sdk_signs_alike(case: str, token: str | None) -> None:
    what = CASES[case]
    pairs = [each.partition("=") for each in what.query.split("&") if each]
    query = {name: unquote(value) for name, _, value in pairs}
    assert_sdk_agrees(what, unquote(what.path), query, token)


@pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")
@pytest.mark.parametrize("token", [None, STS], ids=["", "token"])
@pytest.mark.parametrize(
    ("method", "query", "body"),
    [
        ("GET", {"IndexName": "a b+c&漢", "PageNumber": "1", "Empty": ""}, None),
        ("POST", {}, {"FileName": "a.txt", "SizeInBytes": "1000"}),
    ],
)
def test_request_of_the_sdk_s_own_client_is_signed_as_it_signs_it(
    method: str, query: dict[str, str], body: dict[str, str] | None, token: str | None
) -> None:
    config = Config(
        access_key_id=KEY_ID, access_key_secret=KEY, security_token=token, endpoint=HOST
    )
    operation = Params(
        action="ListIndices",
        version="2023-12-29",
        protocol="HTTPS",
        pathname=PATH,
        method=method,
        auth_type="AK",
        style="ROA",
        req_body_type="json",
        body_type="json",
    )
    do_action = "alibabacloud_tea_openapi.client.DaraCore.do_action"
    with (
        patch.object(Utils, "get_timestamp", lambda: DATE),
        patch.object(Utils, "get_nonce", lambda: NONCE),
        patch(do_action, side_effect=ConnectionRefusedError) as sending,
        pytest.raises(UnretryableException),
    ):
        Client(config).call_api(
            operation, OpenApiRequest(query=query, body=body, headers={}), RuntimeOptions()
        )
    (theirs, *_), _ = sending.call_args
    body_bytes = (theirs.body or "").encode()
    sent = dict(theirs.headers)
    del sent["Authorization"]
    # For the provider's statistics alone, and what `Credential` says already: undocumented both.
    sent.pop("x-acs-credentials-provider", None)
    sent.pop("x-acs-accesskey-id", None)
    # What the SDK signs but for two that a proxy on the way may rewrite.
    signed_by_sdk = {n: v for n, v in sent.items() if n not in ("accept", "user-agent")}
    body_hash = sha256(body_bytes).hexdigest()
    authorization = sdk_authorization(method, PATH, theirs.query, signed_by_sdk, body_hash)

    host = sent.pop("host")
    from_wire = [(n, v) for n, v in sent.items() if n not in SCHEME.own_headers]
    what = request(
        *from_wire, method=method, host=host, query=urlencode(theirs.query), body=body_bytes
    )
    signed = sign(what, token, Options())
    assert dict(from_wire) | signed.headers == sent | {"Authorization": authorization}


@pytest.mark.parametrize(
    ("time", "date_time"),
    [
        ("2024-06-30T23:59:59.999+00:00", "2024-06-30T23:59:59Z"),
        ("2024-07-01T00:00:00+00:00", "2024-07-01T00:00:00Z"),
        ("2024-12-31T23:59:59.5+00:00", "2024-12-31T23:59:59Z"),
        ("2024-02-29T00:00:00.001+00:00", "2024-02-29T00:00:00Z"),
    ],
)
def test_date_is_the_second_that_has_begun(time: str, date_time: str) -> None:
    now = datetime.fromisoformat(time).timestamp()
    assert sign(request(), now=now).headers["x-acs-date"] == date_time
    assert_sdk_agrees(request(), PATH, {}, now=now)


# What the SDK does otherwise, or cannot say


def test_names_of_parameters_are_encoded_after_they_are_sorted() -> None:
    """The document's way, and that of the SDKs in other languages; this one leaves names bare."""
    signed = sign(request(query="a%3Ab=3&%E4%BD%A0=4&a-b=2&A=1"))
    expected = plain("A=1&a-b=2&a%3Ab=3&%E4%BD%A0=4")
    assert signed.headers["Authorization"] == expected


def test_parameters_that_repeat_keep_their_order() -> None:
    signed = sign(request(query="b=2&a=2&b=1&a=&a=1"))
    assert signed.headers["Authorization"] == plain("a=2&a=&a=1&b=2&b=1")


def test_spelling_of_query_and_path_does_not_matter() -> None:
    tidy = sign(request(path="/a%3Ab/~c", query="a%20b=~c%2Fd&e=")).headers
    assert sign(request(path="/a:b/%7ec", query="e&a+b=%7Ec/d")).headers == tidy
    assert sign(request(path="/%61%3ab/~c", query="&a%20b=~c%2fd&&e=")).headers == tidy


@pytest.mark.parametrize("path", ["/a%2fb/c", "/a%2Fb%2Fc", "%2Fa/b/c"])
def test_encoded_slash_is_signed_as_a_slash(path: str) -> None:
    """The document encodes the decoded path, and so does the SDK."""
    what = request(path=path)
    assert sign(what).headers["Authorization"] == plain(path="/a/b/c")
    assert_sdk_agrees(what, "/a/b/c", {})


def test_bytes_that_are_no_text_are_signed_as_they_are() -> None:
    value = b" caf\xe9  \xff\xc2\xa0 ".decode(errors="surrogateescape")
    signed = sign(request(("x-acs-a", value), path="/%FF", query="a=%FF%E4&%FE="))
    expected = plain("a=%FF%E4&%FE=", (b"x-acs-a:caf\xe9  \xff\xc2\xa0",), path="/%FF")
    assert signed.headers["Authorization"] == expected


def test_nothing_else_of_the_head_is_signed() -> None:
    others = request(("accept", "*/*"), ("user-agent", "a"), ("traceparent", "b"), ("x-b", "c"))
    assert sign(others) == sign(request())


# What the caller sends of its own


def vector(*headers: list[str], token: str | None = None) -> dict[str, Any]:
    return {
        "scheme": "ACS3-HMAC-SHA256",
        "credentials": {
            "access_key_id": KEY_ID,
            "access_key_secret": KEY,
            "security_token": token,
        },
        "options": {"action": "ListIndices", "version": "2023-12-29"},
        "request": {
            "method": "POST",
            "url": f"https://{HOST}{PATH}",
            "headers": list(headers),
            "body": "{}",
        },
    }


@pytest.mark.parametrize("token", [None, STS], ids=["", "token"])
def test_caller_s_authorization_date_nonce_and_token_do_not_survive(token: str | None) -> None:
    stale = vector(
        ["Authorization", "ACS3-HMAC-SHA256 Credential=theirs"],
        ["Date", "Thu, 01 Jan 1970 00:00:00 GMT"],
        ["X-Acs-Date", "1970-01-01T00:00:00Z"],
        ["x-acs-signature-nonce", "theirs"],
        ["x-acs-content-sha256", EMPTY_HASH],
        ["x-acs-security-token", "theirs"],
        ["x-acs-accesskey-id", "theirs"],
        ["x-acs-bearer-token", "theirs"],
        ["x-acs-signature-type", "BEARERTOKEN"],
        token=token,
    )
    clean = sign_vector(vector(token=token), now=NOW, nonce=NONCE)
    assert sign_vector(stale, now=NOW, nonce=NONCE) == clean


def test_caller_chooses_the_operation_where_no_option_does() -> None:
    chosen = request(("x-acs-action", " ListIndices "), ("x-acs-version", "2023-12-29"))
    assert sign(chosen, options=Options()) == sign(request())


def test_option_wins_over_the_caller_s_choice() -> None:
    chosen = request(("x-acs-action", "DeleteIndex"), ("x-acs-version", "1970-01-01"))
    assert sign(chosen) == sign(request())


@pytest.mark.parametrize("headers", [(), (("x-acs-action", ""),), (("x-acs-version", "1"),)])
def test_request_without_an_action_cannot_be_signed(headers: Any) -> None:
    with pytest.raises(CannotSign, match="header x-acs-action, or set the option `action`"):
        sign(request(*headers), options=Options(version="1"))


@pytest.mark.parametrize("headers", [(), (("x-acs-version", " "),), (("x-acs-action", "A"),)])
def test_request_without_a_version_cannot_be_signed(headers: Any) -> None:
    with pytest.raises(CannotSign, match="header x-acs-version, or set the option `version`"):
        sign(request(*headers), options=Options(action="A"))


def test_each_try_is_signed_anew() -> None:
    first = sign(request())
    later = sign(request(), now=NOW + 1)
    again = sign(request(), nonce="another")
    assert first.good_until == later.good_until == 0
    assert len({each.headers["Authorization"] for each in (first, later, again)}) == 3
    assert again.headers["x-acs-signature-nonce"] == "another"


def test_body_is_part_of_the_signature() -> None:
    assert SCHEME.needs_body(OPTIONS)
    one, other = sign(request(body=b"1")), sign(request(body=b"2"))
    assert one.headers["Authorization"] != other.headers["Authorization"]


# Settings


@pytest.mark.parametrize("value", ["", "List Indices", "a\n", "a\r\nb: c", "é"])
@pytest.mark.parametrize("name", ["action", "version"])
def test_option_that_no_header_can_carry_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Options(**{name: value})


@pytest.mark.parametrize(
    "answer",
    [
        b'{"RequestId":"1","Message":"Specified time stamp or date value is expired.",'
        b'"HostId":"bailian.cn-beijing.aliyuncs.com","Code":"InvalidTimeStamp.Expired"}',
        b'<Error><Code>IllegalTimestamp</Code><Message>The input parameter "Timestamp" that is '
        b"mandatory for processing this request is not supplied.</Message></Error>",
    ],
)
def test_answer_to_a_clock_that_is_off_is_known(answer: bytes) -> None:
    assert any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize(
    "code", [b"SignatureDoesNotMatch", b"SignatureNonceUsed", b"InvalidSecurityToken.Expired"]
)
def test_answer_to_a_wrong_key_an_old_token_or_a_used_nonce_is_not_taken_for_one(
    code: bytes,
) -> None:
    assert not any(mark in b'{"Code":"%b"}' % code for mark in SCHEME.expired)
