"""Baidu AI Cloud's signature, held against its documentation's example and its SDK."""

from __future__ import annotations

import hmac
import warnings
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.signers.bce_auth_v1 import SCHEME, Credentials, Options, qianfan_status
from filters.signers.scheme import Request, Signed
from filters.signers.vector import sign_vector
from sidecar.api import Secret
from tests.support.vectors import vectors_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of escapes in its source
    from baidubce.auth import bce_v1_signer
    from baidubce.utils import normalize_string

pytestmark = pytest.mark.filterwarnings(  # of the SDK, from Python 3.12 on
    "ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning"
)

NOW = datetime(2024, 7, 1, 8, 0, 0, tzinfo=UTC).timestamp()
DATE = "2024-07-01T08:00:00Z"
HOST = "aip.baidubce.com"
PATH = "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/completions"
KEY_ID = "fakeak0123456789abcdef0123456789"
KEY = "fakesk9876543210fedcba9876543210"
OPTIONS = Options()
DEFAULT_SET = Options(signed_headers=None)
LISTED = Options(signed_headers=["host", "x-bce-date", "content-type", "appid"])
JSON = ("content-type", "application/json")


def credentials(token: str | None = None) -> Credentials:
    return Credentials(
        access_key_id=Secret(KEY_ID),
        secret_access_key=Secret(KEY),
        security_token=None if token is None else Secret(token),
    )


def request(
    *headers: tuple[str, str],
    method: str = "POST",
    host: str = HOST,
    path: str = PATH,
    query: str = "",
    body: bytes | None = None,
) -> Request:
    return Request(method, host, path, query, headers, body)


def sign(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> Signed:
    return SCHEME.sign(what, credentials(token), options, now, "unused")


def lines(signed: Signed) -> list[str]:
    """Of the canonical request: method, path, query, and the headers."""
    return signed.steps["canonical_request"].split("\n")


def names(signed: Signed) -> str:
    """The signed headers as `Authorization` lists them."""
    return signed.headers["Authorization"].split("/")[4]


class Pairs(list[tuple[bytes, bytes]]):
    """Parameters that may repeat, with what the SDK wants of a dictionary."""

    def items(self) -> list[tuple[bytes, bytes]]:
        return self


def sdk(what: Request, token: str | None, options: Options, now: float) -> str:
    """The SDK's `Authorization`, for a query that is encoded in the one way and repeats no header.

    It lists what it is told, whether the request has it or not; of `all` it knows nothing.
    """
    headers = {b"host": what.host.encode()}
    for name, value in what.headers:
        headers[name.encode()] = value.encode(errors="surrogateescape")
    headers[b"x-bce-date"] = datetime.fromtimestamp(int(now), UTC).strftime("%FT%TZ").encode()
    if token is not None:
        headers[b"x-bce-security-token"] = token.encode()
    listed: list[bytes] | None = None
    if options.signed_headers == "all":
        listed = sorted(
            name
            for name, value in headers.items()
            if value.strip() and (name in (b"content-type", b"host") or name.startswith(b"x-bce-"))
        )
    elif options.signed_headers is not None:
        listed = sorted(name.encode() for name in options.signed_headers)
    params = Pairs()
    for each in what.query.split("&") if what.query else ():
        key, _, text = each.partition("=")
        params.append((unquote_to_bytes(key), unquote_to_bytes(text)))
    found: bytes = bce_v1_signer.sign(
        SimpleNamespace(access_key_id=KEY_ID.encode(), secret_access_key=KEY.encode()),
        what.method.encode(),
        normalize_string(unquote_to_bytes(what.path), encoding_slash=False),
        headers,
        params,
        int(now),
        options.expiration_seconds,
        listed,
    )
    return found.decode()


def assert_sdk_agrees(
    what: Request, token: str | None = None, options: Options = OPTIONS, now: float = NOW
) -> None:
    signed = sign(what, token, options, now)
    assert signed.headers["Authorization"] == sdk(what, token, options, now)
    assert signed.headers.get("x-bce-security-token") == token
    assert signed.query is None


def plain(canonical_request: bytes, listed: str) -> str:
    """`Authorization` for a canonical request, by the documentation's steps."""
    prefix = f"bce-auth-v1/{KEY_ID}/{DATE}/1800"
    key = hmac.new(KEY.encode(), prefix.encode(), "sha256").hexdigest()
    signature = hmac.new(key.encode(), canonical_request, "sha256").hexdigest()
    return f"{prefix}/{listed}/{signature}"


# Vectors


@pytest.mark.parametrize("vector", vectors_of("bce-auth-v1"), ids=lambda each: each["id"])
def test_vector(vector: dict[str, Any]) -> None:
    result = sign_vector(vector, now=0, nonce="")
    assert result["headers"] == vector["expected"]["headers"]
    assert result["intermediate"] == vector["expected"]["intermediate"]
    assert result["url"] == vector["request"]["url"]


# Against the SDK

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SEGMENTS = st.one_of(
    TEXT.map(lambda text: quote(text, safe="")),
    TEXT.map(lambda text: quote(text, safe="~!$&'()*+,;=:@")),
    st.sampled_from(["", ".", "..", "%2E%2E", "~a", "%7Ea", "v1:0", "v1%3A0", "a+b", "%ff"]),
    st.sampled_from(["%2F", "a%2fb"]),
)
PATHS = st.lists(SEGMENTS, max_size=6).map(lambda segments: "/" + "/".join(segments))
PARAMETERS = st.tuples(TEXT.filter(lambda name: name.lower() != "authorization"), TEXT)
QUERIES = st.lists(PARAMETERS, max_size=5).map(
    lambda pairs: "&".join(
        f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs
    )
)
VALUES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20).map(
    lambda text: f" \t{text} "
) | st.just("")
NAMES = st.one_of(
    st.sampled_from(["content-type", "content-length", "content-md5", "date", "appid", "x-a"]),
    st.sampled_from(["x-bce-a", "x-bce-a-b", "x-bce-a.b", "x-bce-a!", "x-bce-a1", "x-bceless"]),
    st.from_regex(r"x-[a-z0-9_.-]{1,10}", fullmatch=True).filter(
        lambda name: name not in SCHEME.own_headers
    ),
)
REQUESTS = st.builds(
    Request,
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    host=st.sampled_from([HOST, f"{HOST}:8443", "127.0.0.1:8080", "[::1]:8080"]),
    path=PATHS,
    query=QUERIES,
    headers=st.dictionaries(NAMES, VALUES, max_size=6).map(lambda each: tuple(each.items())),
    body=st.none() | st.binary(max_size=16),
)
TOKENS = st.none() | st.text("ABCxyz019+/=|", min_size=1, max_size=40)
OPTION_SETS = st.builds(
    Options,
    expiration_seconds=st.integers(1, 100_000),
    signed_headers=st.sampled_from(["all", None])
    | st.lists(NAMES | st.sampled_from(["host", "x-bce-date"]), min_size=1),
)
TIMES = st.floats(min_value=1, max_value=4_000_000_000).map(lambda now: round(now, 3))


@settings(deadline=None, max_examples=250)
@given(REQUESTS, TOKENS, OPTION_SETS, TIMES)
@example(request(path="/"), None, OPTIONS, NOW)
def test_sdk_signs_any_request_alike(
    what: Request, token: str | None, options: Options, now: float
) -> None:
    assert_sdk_agrees(what, token, options, now)


CASES = {
    "nothing but the host": request(method="GET"),
    "padded values": request(("content-type", " \ttext/plain; charset=utf-8 ")),
    "empty values": request(("content-type", ""), ("x-bce-a", "  ")),
    "values in UTF-8": request(("x-bce-a", "é漢😀")),
    "no-break spaces": request(("x-bce-a", "\u00a0a\u00a0")),
    "bytes that are no text": request(
        ("x-bce-a", b"caf\xe9\xa0\xff".decode(errors="surrogateescape")),
        path="/%FF",
        query="a=%FF%E4&%FE=",
    ),
    "names of which one starts the other": request(
        ("x-bce-a", "1"), ("x-bce-a-b", "2"), ("x-bce-a1", "3")
    ),
    "path in UTF-8": request(path="/%E4%BD%A0%E5%A5%BD/~x/%7Ey"),
    "encoded slash": request(path="/a%2Fb%2f%2Fc"),
    "path with what others leave unencoded": request(path="/v1:0/a+b/(c)/!*'"),
    "repeated parameters": request(query="b=2&a=2&b=1&a=&a=1"),
    "empty parameters": request(query="flag&other=&=x"),
    "parameters of which one starts the other": request(query="text=x&text1=x&text10=x"),
    "encoded parameters": request(query="%E4%BD%A0=%20%2B%26%3D&a-b=1&a.b=2&a_b=3&a~b=4&A=5"),
    "other port": request(host="localhost:8000"),
    "every header of the default set": request(
        JSON, ("content-length", "2"), ("content-md5", "mZFLkyvTelC5g8XnyQrpOw=="), ("date", "x")
    ),
    "large body": request(JSON, body=b"\x00\xff" * 512 * 1024),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("token", [None, "FwoGZXIvYXdzEFAKE/token+=="], ids=["", "token"])
@pytest.mark.parametrize(
    "options", [OPTIONS, LISTED, DEFAULT_SET], ids=["all", "listed", "default set"]
)
def test_sdk_signs_alike(case: str, token: str | None, options: Options) -> None:
    assert_sdk_agrees(CASES[case], token, options)


@pytest.mark.parametrize(
    ("time", "date"),
    [
        ("2024-06-30T23:59:59.999+00:00", "2024-06-30T23:59:59Z"),
        ("2024-07-01T00:00:00+00:00", "2024-07-01T00:00:00Z"),
        ("2024-12-31T23:59:59.5+00:00", "2024-12-31T23:59:59Z"),
        ("2024-02-29T00:00:00.001+00:00", "2024-02-29T00:00:00Z"),
    ],
)
def test_date_of_header_and_signature_are_of_one_moment(time: str, date: str) -> None:
    now = datetime.fromisoformat(time).timestamp()
    headers = sign(request(), now=now).headers
    assert headers["x-bce-date"] == date
    assert headers["Authorization"].startswith(f"bce-auth-v1/{KEY_ID}/{date}/1800/")
    assert_sdk_agrees(request(), now=now)


# What the SDK does otherwise, or leaves to the client


def test_spelling_of_path_and_query_does_not_matter() -> None:
    """Everything is signed decoded and encoded again; `+` is a space in a query."""
    expected = sign(request(path="/a%20b/~c", query="a%20b=~c%2Fd&e=")).headers
    assert sign(request(path="/%61%20b/%7ec", query="a+b=%7Ec/d&e")).headers == expected
    assert sign(request(path="/a%20b/~c", query="&e=&&a%20b=~c/d")).headers == expected


@pytest.mark.parametrize("path", ["/a%2fb/c", "/a%2Fb%2Fc", "%2Fa/b/c"])
def test_encoded_slash_is_signed_as_a_slash(path: str) -> None:
    signed = sign(request(path=path))
    assert lines(signed)[1] == "/a/b/c"
    canonical = f"POST\n/a/b/c\n\nhost:{HOST}\nx-bce-date:{quote(DATE)}"
    assert signed.headers["Authorization"] == plain(canonical.encode(), "host;x-bce-date")


def test_repeated_header_is_signed_as_one_list() -> None:
    signed = sign(request(("x-bce-a", " 2 "), ("content-type", "x/y"), ("x-bce-a", "1")))
    canonical = (
        f"POST\n{PATH}\n\ncontent-type:x%2Fy\nhost:{HOST}\nx-bce-a:2%2C1\nx-bce-date:{quote(DATE)}"
    )
    listed = "content-type;host;x-bce-a;x-bce-date"
    assert signed.headers["Authorization"] == plain(canonical.encode(), listed)


@pytest.mark.parametrize(
    ("query", "wire"),
    [
        ("authorization=bce-auth-v1%2Fx", ""),
        ("a=%2f&authorization=x&b", "a=%2f&b"),
        ("Authorization=x&a=1&authorization", "a=1"),
        ("a%75thorization=x&a=1", "a=1"),
    ],
)
def test_url_signature_of_the_caller_is_taken_off(query: str, wire: str) -> None:
    """The SDK would sign it, the documentation does not: the request has it no more."""
    signed = sign(request(query=query))
    assert signed.query == wire
    assert signed.headers == sign(request(query=wire)).headers


def test_parameter_that_only_looks_like_a_signature_stays() -> None:
    signed = sign(request(query="authorizations=1&a=authorization"))
    assert signed.query is None
    assert lines(signed)[2] == "a=authorization&authorizations=1"


# Which headers are signed

SENT = (("accept", "*/*"), ("appid", "1"), JSON, ("content-length", "2"), ("x-bce-a", "1"))


def covered(signed: Signed) -> list[str]:
    """The names of the headers that are in the canonical request."""
    return [line.split(":")[0] for line in lines(signed)[3:]]


@pytest.mark.parametrize("options", [OPTIONS, Options(signed_headers="all")], ids=["", "all"])
def test_type_host_and_every_x_bce_are_signed_and_listed_by_default(options: Options) -> None:
    signed = sign(request(*SENT), "token", options)
    assert names(signed) == "content-type;host;x-bce-a;x-bce-date;x-bce-security-token"
    assert covered(signed) == names(signed).split(";")


@pytest.mark.parametrize("sent", [(), (("content-type", ""),), (("content-type", " \t"),)])
def test_type_is_not_listed_by_default_when_there_is_none(sent: Any) -> None:
    signed = sign(request(*sent, ("content-length", "2"), ("content-md5", "x")))
    assert names(signed) == "host;x-bce-date"
    assert covered(signed) == ["host", "x-bce-date"]


@pytest.mark.parametrize(
    ("listed", "written", "signed_names"),
    [
        (["host", "x-bce-date"], "host;x-bce-date", ["host", "x-bce-a", "x-bce-date"]),
        # Sorted, and in lower case.
        (
            ["X-Bce-Date", "HOST", "AppId", "accept"],
            "accept;appid;host;x-bce-date",
            ["accept", "appid", "host", "x-bce-a", "x-bce-date"],
        ),
        # The request has no such headers.
        (
            ["x-bce-missing", "missing", "host"],
            "host;missing;x-bce-missing",
            ["host", "x-bce-a", "x-bce-date"],
        ),
        # Nothing is added to it.
        (["content-type"], "content-type", ["content-type", "x-bce-a", "x-bce-date"]),
    ],
)
def test_list_is_written_as_given_and_signed_as_far_as_it_is_there_with_every_x_bce(
    listed: list[str], written: str, signed_names: list[str]
) -> None:
    signed = sign(request(*SENT), options=Options(signed_headers=listed))
    assert names(signed) == written
    assert covered(signed) == signed_names


def test_token_is_signed_and_not_listed_unless_it_is_named() -> None:
    bare = sign(request(), "token", Options(signed_headers=["host"]))
    assert names(bare) == "host"
    assert covered(bare) == ["host", "x-bce-date", "x-bce-security-token"]
    named = Options(signed_headers=["host", "x-bce-security-token"])
    assert names(sign(request(), "token", named)) == "host;x-bce-security-token"


def test_null_stands_for_the_default_set_and_writes_no_list() -> None:
    signed = sign(request(*SENT), options=DEFAULT_SET)
    assert names(signed) == ""
    assert covered(signed) == [*("content-length", "content-type", "host", "x-bce-a", "x-bce-date")]


# What the caller sends of its own


def test_caller_s_authorization_date_token_and_hash_do_not_survive() -> None:
    vector = {
        "scheme": "bce-auth-v1",
        "credentials": {"access_key_id": KEY_ID, "secret_access_key": KEY},
        "request": {"method": "POST", "url": f"https://{HOST}{PATH}", "body": "{}"},
    }
    expected = sign_vector(vector, now=NOW, nonce="")
    vector["request"]["headers"] = [  # type: ignore[index]
        ["Authorization", "bce-auth-v1/theirs/1970-01-01T00:00:00Z/1800/host/00"],
        ["X-Bce-Date", "1970-01-01T00:00:00Z"],
        ["x-bce-security-token", "theirs"],
        ["x-bce-content-sha256", "0" * 64],
    ]
    assert sign_vector(vector, now=NOW, nonce="") == expected


def test_each_try_is_signed_anew() -> None:
    first, second = sign(request()), sign(request(), now=NOW + 1)
    assert first.good_until == second.good_until == 0
    assert first.headers["Authorization"] != second.headers["Authorization"]


def test_body_is_no_part_of_the_signature() -> None:
    assert not SCHEME.needs_body(OPTIONS)
    assert sign(request(body=None)) == sign(request(body=b"1"))


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expiration_seconds", 0),
        ("expiration_seconds", -1),
        ("expiration_seconds", 1.5),
        ("signed_headers", "host"),
        ("signed_headers", "ALL"),
        ("signed_headers", ""),
        ("signed_headers", [""]),
        ("signed_headers", ["host;x-bce-date"]),
        ("signed_headers", ["a/b"]),
        ("signed_headers", ["host\n"]),
    ],
)
def test_setting_that_would_break_the_signature_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        Options(**{field: value})


@pytest.mark.parametrize(
    "answer",
    [
        b'{"code":"RequestExpired","message":"Request has expired. Timestamp date is '
        b'2024-07-01T08:00:00Z","requestId":"47e0ef1a-9bf2-11e1-9279-0100e8cf109a"}',
        b"x-bce-error-code: RequestExpired",
    ],
)
def test_answer_to_a_clock_that_is_off_is_known(answer: bytes) -> None:
    assert any(mark in answer for mark in SCHEME.expired)


@pytest.mark.parametrize("code", [b"SignatureDoesNotMatch", b"InvalidAccessKeyId", b"AccessDenied"])
def test_answer_to_a_wrong_key_is_not_taken_for_one(code: bytes) -> None:
    assert not any(mark in b'{"code":"%b"}' % code for mark in SCHEME.expired)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b'{"error_code":4,"error_msg":"Open api request limit reached"}', 429),
        (b'{"error_code":14,"error_msg":"IAM Certification failed"}', 401),
        (b'{"error_code":18,"error_msg":"Open api qps request limit reached"}', 429),
        (b'{"error_msg":"Rate limit reached for RPM", "error_code" : 336501, "id":"as-1"}', 429),
        (b'{"error_code":336502,"error_msg":"Rate limit reached for TPM"}', 429),
        (b'{"error_code":336100,"error_msg":"try again"}', None),
        (b'{"error_code":1,"error_msg":"Unknown error"}', None),
        (b'{"error_code":"18"}', None),
        (b'{"id":"as-1","object":"chat.completion","result":"error_code 18"}', None),
        (b'{"id":"as-1","result":"{\\"error_code\\": 18}"}', None),
        (b"", None),
    ],
)
def test_error_within_a_200_is_known_by_its_code(answer: bytes, status: int | None) -> None:
    assert qianfan_status(answer) == status
    assert SCHEME.status_within_200 is qianfan_status


def test_list_of_no_headers_is_refused_and_a_repeated_name_counts_once() -> None:
    with pytest.raises(ValueError, match="name at least `host`"):
        Options(signed_headers=[])
    assert Options(signed_headers=["HOST", "host"]).signed_headers == ["host"]
