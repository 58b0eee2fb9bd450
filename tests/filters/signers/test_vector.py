"""A request to sign, as JSON: what may be left out, and what is refused with the place and the fix.

The signatures themselves are held against the published vectors beside each scheme's tests.
"""

from __future__ import annotations

import math
from types import NoneType
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from filters.signers import SCHEMES, find
from filters.signers.vector import BadVector, CannotSign, sign_vector
from tests.support.vectors import all_vectors

NOW = 1_719_820_800.0
DATE = "20240701T080000Z"
LONE_SURROGATE = "\ud83d"

PLACE = r"(?m)^{}\b"
"""A line of the refusal begins with it."""

WITHOUT_EXCHANGE = [name for name in SCHEMES if find(name).exchange is None]
OPTIONS = [(name, each) for name in WITHOUT_EXCHANGE for each in find(name).Options.model_fields]
CREDENTIALS = [
    (name, each, field)
    for name in WITHOUT_EXCHANGE
    for each, field in find(name).Credentials.model_fields.items()
]


def may_be_null(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


TOKENS = [(name, each) for name, each, field in CREDENTIALS if may_be_null(field)]
KEYS = [(name, each) for name, each, field in CREDENTIALS if not may_be_null(field)]


def vector_of(scheme: str) -> dict[str, Any]:
    """One with all that `scheme` has to know, and no more."""
    request = {"method": "POST", "url": "https://a.test/v1?b=1", "headers": [], "body": "{}"}
    fields = find(scheme).Credentials.model_fields
    credentials = {name: "id.secret" for name, field in fields.items() if field.is_required()}
    options: dict[str, Any] = {
        "ACS3-HMAC-SHA256": {"action": "ListIndices", "version": "2023-12-29"},
        "AWS4-HMAC-SHA256": {"region": "us-east-1"},
        "TC3-HMAC-SHA256": {"service": "hunyuan", "action": "Chat", "version": "2023-09-01"},
        "basic": {"username": "bot"},
        "volcengine-HMAC-SHA256": {"region": "cn-beijing", "service": "ark"},
    }.get(scheme, {})
    return {"scheme": scheme, "credentials": credentials, "options": options, "request": request}


def sign(vector: Any, nonce: str = "fresh") -> dict[str, Any]:
    return sign_vector(vector, now=NOW, nonce=nonce)


def outcome(vector: Any) -> Any:
    """What comes out, or how it is refused."""
    try:
        return sign(vector)
    except (BadVector, CannotSign) as error:
        return type(error), str(error)


def changed(vector: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    return {**vector, part: {**vector[part], **changes}}


def without(vector: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    return {**vector, part: {key: each for key, each in vector[part].items() if key != name}}


AWS = vector_of("AWS4-HMAC-SHA256")
ACS3 = vector_of("ACS3-HMAC-SHA256")


@pytest.mark.parametrize("scheme", WITHOUT_EXCHANGE)
def test_each_scheme_signs_with_what_it_has_to_know(scheme: str) -> None:
    assert set(sign(vector_of(scheme))) == {"headers", "url", "intermediate"}


# Options and credentials that are null or empty


@pytest.mark.parametrize(
    ("scheme", "option"), [each for each in OPTIONS if each != ("bce-auth-v1", "signed_headers")]
)
def test_option_that_is_null_is_as_if_it_were_not_there(scheme: str, option: str) -> None:
    vector = vector_of(scheme)
    assert outcome(changed(vector, "options", **{option: None})) == outcome(
        without(vector, "options", option)
    )


def test_null_of_bce_s_signed_headers_is_a_choice() -> None:
    bce = vector_of("bce-auth-v1")
    authorization = sign(changed(bce, "options", signed_headers=None))["headers"]["Authorization"]
    assert "/1800//" in authorization
    listed = sign(changed(bce, "options", signed_headers="all"))
    assert "/1800/host;x-bce-date/" in listed["headers"]["Authorization"]
    assert sign(bce) == listed


@pytest.mark.parametrize(
    ("scheme", "option"),
    [
        each
        for each in OPTIONS
        # A region that is empty means none there; and a user may have no name.
        if each not in (("TC3-HMAC-SHA256", "region"), ("basic", "username"))
    ],
)
def test_option_that_is_empty_is_refused(scheme: str, option: str) -> None:
    with pytest.raises(BadVector, match=PLACE.format(rf"options\.{option}")):
        sign(changed(vector_of(scheme), "options", **{option: ""}))


@pytest.mark.parametrize("options", [None, {}])
def test_options_may_be_left_out(options: Any) -> None:
    vector = vector_of("bce-auth-v1")
    expected = sign({key: each for key, each in vector.items() if key != "options"})
    assert sign({**vector, "options": options}) == expected


def test_schemes_with_tokens_are_known() -> None:
    assert TOKENS == [
        ("bce-auth-v1", "security_token"),
        ("ACS3-HMAC-SHA256", "security_token"),
        ("TC3-HMAC-SHA256", "token"),
        ("volcengine-HMAC-SHA256", "session_token"),
        ("AWS4-HMAC-SHA256", "session_token"),
    ]


@pytest.mark.parametrize(("scheme", "token"), TOKENS)
def test_token_that_is_null_or_empty_is_as_if_it_were_not_there(scheme: str, token: str) -> None:
    vector = vector_of(scheme)
    expected = sign(vector)
    assert sign(changed(vector, "credentials", **{token: None})) == expected
    assert sign(changed(vector, "credentials", **{token: ""})) == expected
    assert sign(changed(vector, "credentials", **{token: "t"})) != expected


@pytest.mark.parametrize(("scheme", "key"), KEYS)
def test_key_that_is_null_is_missing(scheme: str, key: str) -> None:
    vector = vector_of(scheme)
    for each in (
        changed(vector, "credentials", **{key: None}),
        without(vector, "credentials", key),
    ):
        with pytest.raises(BadVector, match=PLACE.format(rf"credentials\.{key}")):
            sign(each)


@pytest.mark.parametrize("part", ["credentials", "options"])
def test_key_that_nobody_knows_is_refused(part: str) -> None:
    """But for the notes that vectors have for people."""
    assert sign(changed(AWS, part, note="a", compare="b")) == sign(AWS)
    for value in ("a", 7, None):
        with pytest.raises(BadVector, match=PLACE.format(rf"{part}\.regoin")):
            sign(changed(AWS, part, regoin=value))


# Host


@pytest.mark.parametrize(
    "host", ["b.test:8443", " b.test:8443", "b.test:8443\t", " \tb.test:8443 "]
)
@pytest.mark.parametrize("scheme", ["AWS4-HMAC-SHA256", "bce-auth-v1", "ACS3-HMAC-SHA256"])
def test_host_is_signed_without_the_white_space_around_it(scheme: str, host: str) -> None:
    vector = vector_of(scheme)
    by_url = changed(vector, "request", url="https://b.test:8443/v1?b=1")
    by_header = sign(changed(vector, "request", headers=[["host", host]]))
    assert by_header["headers"] == sign(by_url)["headers"]
    assert by_header["url"] == vector["request"]["url"]


@pytest.mark.parametrize("headers", [[], [["Host", "a.test"]], [["HOST", " a.test "]]])
def test_host_that_a_scheme_sets_is_always_told(headers: list[list[str]]) -> None:
    vector = changed(vector_of("iflytek-hmac-sha256"), "options", mode="header-digest")
    found = sign(changed(vector, "request", headers=headers))["headers"]
    assert found["Host"] == "a.test"
    assert set(found) == {"Host", "Date", "Digest", "Authorization"}


def test_host_is_not_told_where_the_scheme_sets_none() -> None:
    for scheme in ("AWS4-HMAC-SHA256", "volcengine-HMAC-SHA256", "TC3-HMAC-SHA256"):
        found = sign(changed(vector_of(scheme), "request", headers=[["Host", "b.test"]]))
        assert "Host" not in found["headers"]


def test_header_that_is_set_to_what_it_was_is_not_told() -> None:
    vector = vector_of("ACS3-HMAC-SHA256")
    headers = [["x-acs-action", "ListIndices"], ["X-Acs-Version", "1970-01-01"]]
    found = sign(changed(vector, "request", headers=headers))["headers"]
    assert "x-acs-action" not in found
    assert found["x-acs-version"] == "2023-12-29"


# Clock


@pytest.mark.parametrize(
    "clock",
    [
        None,
        {"unix": 1719820800},
        {"unix": 1719820800.999},
        {"unix_ms": 1719820800000},
        {"unix_ms": 1719820800999},
        {"iso": "2024-07-01T08:00:00Z"},
        {"iso": "2024-07-01T08:00:00"},
        {"iso": "2024-07-01T10:00:00+02:00"},
        {"iso": "2024-07-01T08:00:00.5Z", "unix": 1719820800},
    ],
)
def test_clock_is_read_in_each_form(clock: Any) -> None:
    assert sign({**AWS, "clock": clock})["headers"]["X-Amz-Date"] == DATE


@pytest.mark.parametrize(
    ("clock", "date"),
    [
        ({"unix": 0}, "19700101T000000Z"),
        ({"unix": -1}, "19691231T235959Z"),
        ({"iso": "0001-01-01T00:00:00Z"}, "00010101T000000Z"),
        ({"iso": "9999-12-31T23:59:59Z"}, "99991231T235959Z"),
    ],
)
def test_clock_may_be_of_any_year(clock: Any, date: str) -> None:
    assert sign({**AWS, "clock": clock})["headers"]["X-Amz-Date"] == date


@pytest.mark.parametrize(
    "clock",
    [
        *({}, [], "2024-07-01T08:00:00Z", 1719820800, True, {"time": 1}),
        *({"unix": None}, {"unix": "soon"}, {"unix": [1]}, {"unix": {}}),
        *({"unix": math.nan}, {"unix": math.inf}, {"unix": -math.inf}),
        *({"unix": 1e12}, {"unix": -1e12}, {"unix": 10**400}),
        *({"unix_ms": None}, {"unix_ms": "1719820800000"}, {"unix_ms": 10**400}),
        *({"unix_ms": 10**16}, {"unix_ms": math.nan}),
        *({"iso": None}, {"iso": 7}, {"iso": ""}, {"iso": "yesterday"}, {"iso": "2024-13-01"}),
        *({"iso": "0001-01-01T00:00:00+12:00"}, {"iso": "9999-12-31T23:59:59-12:00"}),
    ],
    ids=lambda clock: repr(clock)[:40],
)
@pytest.mark.parametrize("scheme", ["AWS4-HMAC-SHA256", "zhipu-jwt-hs256", "iflytek-hmac-sha256"])
def test_clock_that_shows_no_time_is_refused(scheme: str, clock: Any) -> None:
    with pytest.raises(BadVector, match=PLACE.format("clock")):
        sign({**vector_of(scheme), "clock": clock})


# Nonce


def test_nonce_is_the_one_given() -> None:
    headers = sign({**ACS3, "nonce": "theirs"})["headers"]
    assert headers["x-acs-signature-nonce"] == "theirs"


@pytest.mark.parametrize("vector", [ACS3, {**ACS3, "nonce": None}, {**ACS3, "nonce": ""}])
def test_nonce_is_a_fresh_one_where_none_is_given(vector: dict[str, Any]) -> None:
    headers = sign(vector, nonce="fresh")["headers"]
    assert headers["x-acs-signature-nonce"] == "fresh"


@pytest.mark.parametrize("nonce", [0, 7, 1.5, True, False, [], ["a"], {}])
def test_nonce_of_another_type_is_refused(nonce: Any) -> None:
    with pytest.raises(BadVector, match=PLACE.format("nonce")):
        sign({**ACS3, "nonce": nonce})


# Headers and body


def test_headers_may_be_null_or_left_out() -> None:
    expected = sign(AWS)
    assert sign(changed(AWS, "request", headers=None)) == expected
    assert sign(without(AWS, "request", "headers")) == expected


@pytest.mark.parametrize(
    "headers",
    [
        *({"accept": "a"}, "accept: a", 7, True, ["accept"], [[]], [["accept"]], [None]),
        *([["accept", "a", "b"]], [["accept", None]], [["accept", 7]], [[7, "a"]], [{"a": "b"}]),
    ],
)
def test_headers_of_another_type_are_refused(headers: Any) -> None:
    with pytest.raises(BadVector, match=PLACE.format(r"request\.headers")):
        sign(changed(AWS, "request", headers=headers))


def test_body_may_be_null_or_left_out() -> None:
    expected = sign(changed(AWS, "request", body=""))
    assert sign(changed(AWS, "request", body=None)) == expected
    assert sign(without(AWS, "request", "body")) == expected
    assert sign(changed(AWS, "request", body="a", body_repeat=3)) == sign(
        changed(AWS, "request", body="aaa")
    )


@pytest.mark.parametrize("body", [7, True, [], {}, {"model": "a"}])
def test_body_of_another_type_is_refused(body: Any) -> None:
    with pytest.raises(BadVector, match=PLACE.format(r"request\.body")):
        sign(changed(AWS, "request", body=body))


@pytest.mark.parametrize("scheme", WITHOUT_EXCHANGE)
@pytest.mark.parametrize("body", [LONE_SURROGATE, "a\udc80b"])
def test_half_a_character_in_the_body_is_refused(scheme: str, body: str) -> None:
    with pytest.raises(BadVector, match=PLACE.format(r"request\.body")):
        sign(changed(vector_of(scheme), "request", body=body))


@pytest.mark.parametrize(
    ("vector", "place"),
    [
        (changed(ACS3, "request", method="POST\ud83d"), r"request\.method"),
        (changed(ACS3, "request", url="https://a.test/\ud83d"), r"request\.url"),
        (changed(ACS3, "request", headers=[["x-acs-a", "a\udcff"]]), r"request\.headers"),
        (changed(ACS3, "request", headers=[["x-acs-\udcff", "a"]]), r"request\.headers"),
        ({**ACS3, "nonce": "\ud83d"}, "nonce"),
        (changed(ACS3, "options", action="\ud83d"), r"options\.action"),
        (changed(ACS3, "credentials", access_key_id="\ud83d"), "credentials"),
        (changed(ACS3, "credentials", access_key_secret="\ud83d"), "credentials"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_half_a_character_anywhere_else_is_refused(vector: dict[str, Any], place: str) -> None:
    with pytest.raises(BadVector, match=PLACE.format(place)):
        sign(vector)


def test_whole_character_of_two_surrogates_in_json_is_none() -> None:
    assert sign(changed(AWS, "request", body="😀"))["headers"]


# Every vector's own letters


@pytest.mark.parametrize(
    "vector",
    [each for each in all_vectors() if each["scheme"] in SCHEMES],
    ids=lambda each: each["id"],
)
def test_url_of_a_vector_comes_out_byte_for_byte(vector: dict[str, Any]) -> None:
    expected = vector["expected"].get("url", vector["request"]["url"])
    assert sign(vector)["url"] == expected
