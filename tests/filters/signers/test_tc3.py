"""Tencent Cloud's signature v3, held against the published example and the provider's own SDK."""

from __future__ import annotations

import hmac
import json
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from typing import Any
from unittest.mock import patch
from urllib.parse import urlencode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tencentcloud.common.abstract_client import AbstractClient
from tencentcloud.common.credential import Credential
from tencentcloud.common.http.request import RequestInternal
from tencentcloud.common.profile.client_profile import ClientProfile
from tencentcloud.common.profile.http_profile import HttpProfile

from filters.signers.scheme import CannotSign, Request, Signed
from filters.signers.tc3 import SCHEME, Credentials, Options, status_of
from filters.signers.vector import sign_vector
from sidecar.api import Secret
from tests.support.vectors import vectors_of

# The SDK asks for the date in a way that newer Pythons would rather not see.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")

NOW = datetime(2024, 7, 1, 8, 0, 0, tzinfo=UTC).timestamp()
HOST = "hunyuan.tencentcloudapi.com"
KEY_ID = "fakeAKIDz8krbsJ5yKBZQpn74WFkmLPx3000"
KEY = "fakeGu5t9xGARNpq86cd98joQYCN3EXA"
STS = "fakeToken/0+=="
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
OPERATION = {"action": "ChatCompletions", "version": "2023-09-01"}


def request(
    *headers: tuple[str, str],
    method: str = "POST",
    host: str = HOST,
    path: str = "/",
    query: str = "",
    body: bytes | None = b"{}",
) -> Request:
    return Request(method, host, path, query, headers, body)


def sign(
    what: Request,
    token: str | None = None,
    now: float = NOW,
    operation: dict[str, str] = OPERATION,
    **options: Any,
) -> Signed:
    credentials = Credentials(
        secret_id=Secret(KEY_ID),
        secret_key=Secret(KEY),
        token=None if token is None else Secret(token),
    )
    return SCHEME.sign(what, credentials, Options(**operation, **options), now, "unused")


class Sdk(AbstractClient):
    _service = "hunyuan"
    _apiVersion = "2023-09-01"
    _endpoint = HOST

    def __init__(self, host: str, token: str | None, region: str, unsigned: bool) -> None:
        profile = ClientProfile(httpProfile=HttpProfile(endpoint=host))
        profile.unsignedPayload = unsigned
        super().__init__(Credential(KEY_ID, KEY, token), region, profile)


@cache
def sdk(host: str, token: str | None, region: str, unsigned: bool) -> Sdk:
    return Sdk(host, token, region, unsigned)


def sdk_request(
    method: str,
    params: Any,
    host: str = HOST,
    token: str | None = None,
    region: str = "",
    unsigned: bool = False,
    now: float = NOW,
) -> RequestInternal:
    """The request that the SDK's own client makes of `params`, signed, as it would send it."""
    made = RequestInternal(host, method, "/")
    with patch("tencentcloud.common.abstract_client.time.time", lambda: now):
        client = sdk(host, token, region, unsigned)
        client._build_req_with_tc3_signature("ChatCompletions", params, made)
    return made


def sdk_authorization(what: Request, content_type: str, unsigned: bool, now: float) -> str:
    """The same for any body, query and content type, which that client makes itself."""
    made = RequestInternal(what.host, what.method, "/")
    made.header = {"Host": what.host, "Content-Type": content_type}
    made.header["X-TC-Timestamp"] = str(int(now))
    if unsigned:
        made.header["X-TC-Content-SHA256"] = "UNSIGNED-PAYLOAD"
    made.data = what.query if what.method == "GET" else what.body
    date = datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%d")
    client = sdk(HOST, None, "", False)
    signature = client._get_tc3_signature({}, made, date, "hunyuan", KEY)
    return (
        f"TC3-HMAC-SHA256 Credential={KEY_ID}/{date}/hunyuan/tc3_request, "
        f"SignedHeaders=content-type;host, Signature={signature}"
    )


def plain(
    lines: list[bytes],
    payload: bytes = b"{}",
    method: str = "POST",
    query: str = "",
    service: str = "hunyuan",
) -> str:
    """`Authorization` by the document's words; `lines` are the headers, sorted."""
    names = ";".join(line.partition(b":")[0].decode() for line in lines)
    canonical = f"{method}\n/\n{query}\n".encode() + b"".join(b"%b\n" % line for line in lines)
    canonical += f"\n{names}\n{sha256(payload).hexdigest()}".encode()
    scope = f"2024-07-01/{service}/tc3_request"
    text = f"TC3-HMAC-SHA256\n{int(NOW)}\n{scope}\n{sha256(canonical).hexdigest()}"
    key = b"TC3" + KEY.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), "sha256").digest()
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    return (
        f"TC3-HMAC-SHA256 Credential={KEY_ID}/{scope}, SignedHeaders={names}, Signature={signature}"
    )


# Vectors


@pytest.mark.parametrize("vector", vectors_of("TC3-HMAC-SHA256"), ids=lambda each: each["id"])
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    assert result["headers"] == vector["expected"]["headers"]
    for step, expected in vector["expected"]["intermediate"].items():
        assert result["intermediate"][step] == expected
    assert result["url"] == vector["request"]["url"]


# Against the SDK

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PARAMS = st.dictionaries(st.text("AZaz.0é %&=+", min_size=1, max_size=6), TEXT, max_size=5)
HOSTS = st.sampled_from(
    [HOST, "hunyuan.ap-guangzhou.tencentcloudapi.com", f"{HOST}:443", f"{HOST}:8443"]
)
TIMES = st.floats(min_value=0, max_value=4_000_000_000).map(lambda now: round(now, 3))
TOKENS = st.none() | st.text("ABCxyz019+/=", min_size=1, max_size=40)


@settings(deadline=None, max_examples=150)
@given(
    method=st.sampled_from(["GET", "POST"]),
    params=PARAMS,
    host=HOSTS,
    token=TOKENS,
    region=st.sampled_from(["", "ap-guangzhou"]),
    unsigned=st.booleans(),
    has_type=st.booleans(),
    now=TIMES,
)
@example("GET", {}, HOST, None, "", False, False, NOW)
def test_request_of_the_sdk_s_own_client_is_signed_as_it_signs_it(
    method: str,
    params: dict[str, str],
    host: str,
    token: str | None,
    region: str,
    unsigned: bool,
    has_type: bool,
    now: float,
) -> None:
    theirs = sdk_request(method, params, host, token, region, unsigned, now)
    what = request(
        *([("content-type", theirs.header["Content-Type"])] if has_type else []),
        method=method,
        host=host,
        query=theirs.data if method == "GET" else "",
        body=b"" if method == "GET" else theirs.data.encode(),
    )
    signed = sign(what, token, now, region=region, unsigned_payload=unsigned)
    expected = {
        name: value
        for name, value in theirs.header.items()
        # Not signed, and of no use but to the provider's statistics; and what the request has.
        if name not in ("X-TC-RequestClient", "X-TC-Language", "Host")
        and not (has_type and name == "Content-Type")
    }
    assert signed.headers == expected


@settings(deadline=None, max_examples=150)
@given(
    method=st.sampled_from(["GET", "POST"]),
    query=st.text("abAB01=&+%2.~-_", max_size=20),
    content_type=st.text("abcXYZ/;= -09.", min_size=1).map(str.strip).filter(bool),
    body=st.binary(max_size=64),
    unsigned=st.booleans(),
    now=TIMES,
)
def test_sdk_signs_any_query_body_and_content_type_alike(
    method: str, query: str, content_type: str, body: bytes, unsigned: bool, now: float
) -> None:
    what = request(
        ("accept", "*/*"),
        ("content-type", f" {content_type}\t"),
        method=method,
        query=query if method == "GET" else "",
        body=body,
    )
    expected = sdk_authorization(what, content_type, unsigned, now)
    assert sign(what, now=now, unsigned_payload=unsigned).headers["Authorization"] == expected


CASES = {
    "empty body": request(("content-type", JSON), body=b""),
    "large body": request(("content-type", JSON), body=b"\x00\xff" * 512 * 1024),
    "body in UTF-8": request(("content-type", JSON), body='{"a":"漢😀"}'.encode()),
    "charset": request(("content-type", "application/json; charset=utf-8")),
    "multipart": request(("content-type", "multipart/form-data; boundary=AbC0")),
    "query as on the wire": request(
        ("content-type", FORM), method="GET", query="b=2&a=%e4%BD%a0+x%20y&b=1&c&d=&a=1"
    ),
    "get without a query": request(("content-type", FORM), method="GET"),
    "other port": request(("content-type", JSON), host=f"{HOST}:8000"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unsigned", [False, True], ids=["", "unsigned"])
def test_sdk_signs_alike(case: str, unsigned: bool) -> None:
    what = CASES[case]
    content_type = what.header("content-type") or ""
    expected = sdk_authorization(what, content_type, unsigned, NOW)
    assert sign(what, unsigned_payload=unsigned).headers["Authorization"] == expected


@pytest.mark.parametrize(
    ("time", "date"),
    [
        ("2024-06-30T23:59:59.999+00:00", "2024-06-30"),
        ("2024-07-01T00:00:00+00:00", "2024-07-01"),
        ("2024-12-31T23:59:59.5+00:00", "2024-12-31"),
        ("2024-02-29T00:00:00.001+00:00", "2024-02-29"),
    ],
)
def test_date_of_scope_and_timestamp_are_of_one_moment(time: str, date: str) -> None:
    now = datetime.fromisoformat(time).timestamp()
    headers = sign(request(("content-type", JSON)), now=now).headers
    assert headers["X-TC-Timestamp"] == str(int(now))
    assert f"Credential={KEY_ID}/{date}/hunyuan/" in headers["Authorization"]
    theirs = sdk_request("POST", {}, now=now)
    assert headers["Authorization"] == theirs.header["Authorization"]


# What the SDK never does


def test_action_is_signed_in_lower_case_and_sent_as_it_is() -> None:
    names = ["X-TC-Action", "Host", "Content-Type", "host"]
    headers = sign(request(("content-type", JSON)), signed_headers=names).headers
    assert headers["X-TC-Action"] == "ChatCompletions"
    expected = [
        b"content-type:" + JSON.encode(),
        b"host:" + HOST.encode(),
        b"x-tc-action:chatcompletions",
    ]
    assert headers["Authorization"] == plain(expected)


def test_further_headers_are_signed_when_named() -> None:
    names = ["content-type", "host", "x-tc-language", "x-tc-timestamp", "x-tc-token", "x-a"]
    what = request(("content-type", JSON), ("x-tc-language", " zh-CN "), ("x-a", "caf\udce9"))
    expected = [
        b"content-type:" + JSON.encode(),
        b"host:" + HOST.encode(),
        b"x-a:caf\xe9",
        b"x-tc-language:zh-cn",
        b"x-tc-timestamp:1719820800",
        b"x-tc-token:faketoken/0+==",
    ]
    assert sign(what, STS, signed_headers=names).headers["Authorization"] == plain(expected)


def test_header_that_is_to_be_signed_and_is_not_there_is_named() -> None:
    with pytest.raises(CannotSign, match="header x-a is to be signed"):
        sign(request(), signed_headers=["content-type", "host", "x-a"])


def test_path_is_never_signed() -> None:
    what = request(("content-type", JSON), path="/%E4%BD%A0/x")
    assert sign(what) == sign(request(("content-type", JSON)))


def test_query_of_a_post_and_body_of_a_get_are_not_signed() -> None:
    """The document has both fixed as empty."""
    post, get = request(("content-type", JSON)), request(("content-type", FORM), method="GET")
    assert sign(post._replace(query="a=1")) == sign(post)
    assert sign(get._replace(body=b"a")) == sign(get._replace(body=b""))


@pytest.mark.parametrize(("method", "content_type"), [("POST", JSON), ("GET", FORM)])
@pytest.mark.parametrize("headers", [(), (("content-type", " "),)], ids=["none", "empty"])
def test_missing_content_type_is_set_and_signed(
    method: str, content_type: str, headers: Any
) -> None:
    signed = sign(request(*headers, method=method)).headers
    assert signed.pop("Content-Type") == content_type
    assert signed == sign(request(("content-type", content_type), method=method)).headers


def test_token_is_sent_and_not_signed() -> None:
    with_token = sign(request(), STS).headers
    assert with_token.pop("X-TC-Token") == STS
    assert with_token == sign(request()).headers


def test_unsigned_body_streams_through() -> None:
    assert SCHEME.needs_body(Options())
    assert not SCHEME.needs_body(Options(unsigned_payload=True))
    streamed = sign(request(("content-type", JSON), body=None), unsigned_payload=True)
    assert streamed.headers["X-TC-Content-SHA256"] == "UNSIGNED-PAYLOAD"
    lines = [b"content-type:" + JSON.encode(), b"host:" + HOST.encode()]
    assert streamed.headers["Authorization"] == plain(lines, b"UNSIGNED-PAYLOAD")


# The service


@pytest.mark.parametrize(
    ("host", "service"),
    [
        (HOST, "hunyuan"),
        ("LKEAP.tencentcloudapi.com:443", "lkeap"),
        ("hunyuan.internal.tencentcloudapi.com", "hunyuan"),
    ],
)
def test_service_is_the_first_label_of_the_host(host: str, service: str) -> None:
    headers = sign(request(host=host)).headers
    assert f"/2024-07-01/{service}/tc3_request," in headers["Authorization"]


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "[::1]:8080", "[::ffff:1.2.3.4]", "gateway"])
def test_host_without_a_service_needs_the_option(host: str) -> None:
    with pytest.raises(CannotSign, match="option `service`"):
        sign(request(host=host))
    signed = sign(request(("content-type", JSON), host=host), service="hunyuan").headers
    lines = [b"content-type:" + JSON.encode(), b"host:" + host.encode()]
    assert signed["Authorization"] == plain(lines)


# What the caller sends of its own


def test_caller_s_authorization_time_and_token_do_not_survive() -> None:
    vector: dict[str, Any] = {
        "scheme": "TC3-HMAC-SHA256",
        "credentials": {"secret_id": KEY_ID, "secret_key": KEY},
        "options": OPERATION,
        "request": {"method": "POST", "url": f"https://{HOST}/", "body": "{}"},
    }
    clean = sign_vector(vector, now=NOW, nonce="")
    vector["request"]["headers"] = [
        ["Authorization", "TC3-HMAC-SHA256 Credential=theirs"],
        ["X-TC-Timestamp", "1"],
        ["x-tc-token", "theirs"],
        ["X-Tc-Content-Sha256", "UNSIGNED-PAYLOAD"],
    ]
    assert sign_vector(vector, now=NOW, nonce="") == clean


def test_caller_chooses_the_operation_where_no_option_does() -> None:
    chosen = request(
        ("x-tc-action", " ChatCompletions "),
        ("x-tc-version", "2023-09-01"),
        ("x-tc-region", "ap-guangzhou"),
    )
    assert sign(chosen, operation={}) == sign(request(), region="ap-guangzhou")


def test_option_wins_over_the_caller_s_choice() -> None:
    chosen = request(("x-tc-action", "A"), ("x-tc-version", "1"), ("x-tc-region", "b"))
    names = ["content-type", "host", "x-tc-action", "x-tc-region", "x-tc-version"]
    options = {"region": "ap-guangzhou", "signed_headers": names}
    assert sign(chosen, **options) == sign(request(), **options)


def test_region_is_left_out_where_nobody_names_one() -> None:
    assert "X-TC-Region" not in sign(request()).headers
    assert "X-TC-Region" not in sign(request(), region="").headers


def test_request_with_a_region_is_refused_where_there_is_to_be_none() -> None:
    with pytest.raises(CannotSign, match="leave out the header X-TC-Region"):
        sign(request(("x-tc-region", "ap-guangzhou")), region="")


@pytest.mark.parametrize("headers", [(), (("x-tc-action", ""),), (("x-tc-version", "1"),)])
def test_request_without_an_action_cannot_be_signed(headers: Any) -> None:
    with pytest.raises(CannotSign, match="header X-TC-Action, or set the option `action`"):
        sign(request(*headers), operation={"version": "1"})


@pytest.mark.parametrize("headers", [(), (("x-tc-version", " "),), (("x-tc-action", "A"),)])
def test_request_without_a_version_cannot_be_signed(headers: Any) -> None:
    with pytest.raises(CannotSign, match="header X-TC-Version, or set the option `version`"):
        sign(request(*headers), operation={"action": "A"})


def test_each_try_is_signed_anew() -> None:
    first, second = sign(request()), sign(request(), now=NOW + 1)
    assert first.good_until == second.good_until == 0
    assert first.headers["Authorization"] != second.headers["Authorization"]


def test_body_is_signed_as_its_bytes_are() -> None:
    spaced, tight = json.dumps({"a": [1, 2]}), json.dumps({"a": [1, 2]}, separators=(",", ":"))
    one, other = sign(request(body=spaced.encode())), sign(request(body=tight.encode()))
    assert one.headers["Authorization"] != other.headers["Authorization"]


def test_query_of_a_get_is_signed_in_its_order() -> None:
    pairs = [("Offset", "0"), ("Limit", "10")]
    one = sign(request(method="GET", query=urlencode(pairs)))
    other = sign(request(method="GET", query=urlencode(pairs[::-1])))
    assert one.headers["Authorization"] != other.headers["Authorization"]


# Settings


@pytest.mark.parametrize(
    "options",
    [
        *({name: "a\r\nb: c"} for name in ("service", "action", "version", "region")),
        *({name: ""} for name in ("service", "action", "version")),
        {"service": "a/b"},
        {"region": "ap guangzhou"},
    ],
    ids=str,
)
def test_option_that_would_break_header_or_scope_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        Options(**options)


@pytest.mark.parametrize("names", [[], ["host"], ["content-type", "x-tc-action"]], ids=str)
def test_host_and_content_type_have_to_be_signed(names: list[str]) -> None:
    with pytest.raises(ValidationError, match="name them, too"):
        Options(signed_headers=names)


def test_signature_cannot_sign_itself() -> None:
    with pytest.raises(ValidationError, match="cannot be signed"):
        Options(signed_headers=["content-type", "host", "Authorization"])


def test_answer_to_a_clock_that_is_off_is_known() -> None:
    answer = (
        b'{"Response":{"Error":{"Code":"AuthFailure.SignatureExpire","Message":"The provided '
        b'credentials have expired."},"RequestId":"1"}}'
    )
    assert any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize(
    "code",
    [
        b"AuthFailure.SignatureFailure",
        b"AuthFailure.SecretIdNotFound",
        b"AuthFailure.TokenFailure",
        b"AuthFailure.UnauthorizedOperation",
    ],
)
def test_answer_to_a_wrong_key_or_an_old_token_is_not_taken_for_one(code: bytes) -> None:
    answer = b'{"Response":{"Error":{"Code":"%b"},"RequestId":"1"}}' % code
    assert not any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("AuthFailure.SecretIdNotFound", 401),
        ("AuthFailure.SignatureFailure", 401),
        ("AuthFailure.SignatureExpire", 401),
        ("RequestLimitExceeded", 429),
        ("RequestLimitExceeded.UinLimitExceeded", 429),
        ("LimitExceeded", 429),
        ("LimitExceeded.Quota", None),
        ("InvalidParameter", None),
        ("InternalError", None),
    ],
)
def test_error_within_a_200_is_known_by_its_code(code: str, status: int | None) -> None:
    error = {"Code": code, "Message": "AuthFailure."}
    answer = {"Response": {"Error": error, "RequestId": "1"}}
    assert status_of(json.dumps(answer).encode()) == status
    assert status_of(json.dumps(answer, indent=1).encode()) == status
    assert SCHEME.status_within_200 is status_of


def test_answer_that_speaks_of_an_error_is_none() -> None:
    text = json.dumps({"Error": {"Code": "AuthFailure.SecretIdNotFound"}})
    answer = {"Response": {"Choices": [{"Message": {"Content": text}}], "RequestId": "1"}}
    assert status_of(json.dumps(answer).encode()) is None
