"""A provider's code is found wherever that provider puts it."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.algo.refusals import Told, read_refusal
from sidecar.api import Headers

NO_HEADERS = Headers()


def codes(data: bytes, headers: dict[str, str] | None = None) -> tuple[str, ...]:
    return read_refusal(data, Headers(headers or {})).codes


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            b'{"error":{"message":"m","type":"insufficient_quota","code":"credit_balance_exhausted"}}',
            ("credit_balance_exhausted", "insufficient_quota"),
        ),
        (
            b'{"type":"error","error":{"type":"rate_limit_error",'
            b'"details":{"error_code":"enforced_spend_limit_reached"}}}',
            ("rate_limit_error", "enforced_spend_limit_reached"),
        ),
        (b'{"error":{"code":"1113","message":"m"}}', ("1113",)),
        (b'{"error_code":18,"error_msg":"m"}', ("18",)),
        (b'{"code":"Throttling.RateQuota","message":"m"}', ("Throttling.RateQuota",)),
        (b'{"code":10007,"message":"m","sid":"s"}', ("10007",)),
        (b'{"Response":{"Error":{"Code":"LimitExceeded","Message":"m"}}}', ("LimitExceeded",)),
        (b'{"ResponseMetadata":{"Error":{"Code":"Flow"}}}', ("Flow",)),
        (b'{"__type":"com.amazon.x#ThrottlingException"}', ("ThrottlingException",)),
        (b'[{"error":{"code":429,"status":"UNAVAILABLE"}}]', ("429", "UNAVAILABLE")),
        (b'{"error":"server busy"}', ()),
        (b'{"error":{"code":null,"type":true}}', ()),
        (b'data: {"Id":"1","ErrorMsg":{"Code":4001,"Msg":"m"}}\n\n', ("4001",)),
        (
            b'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"code":"Throttling","message":"m"}\n\n',
            ("Throttling",),
        ),
        (b': keep-alive\r\n\r\ndata: {"code":1}\r\n\r\ndata: {"code":2}\r\n\r\n', ("1",)),
        (b'data: {"error":\ndata: {"code":"two_lines"}}\n\n', ("two_lines",)),
        (b'{"error_code":4,"error_msg":"m"}\n{"more":1}\n', ("4",)),
        (b"<html>busy</html>", ()),
        (b"", ()),
        (b"[]", ()),
        (b"data: [DONE]\n\n", ()),
    ],
)
def test_code_is_found_where_it_stands(data: bytes, expected: tuple[str, ...]) -> None:
    assert codes(data) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-amzn-errortype": "ThrottlingException:http://internal/"}, ("ThrottlingException",)),
        (
            {"x-amzn-errortype": "ns#ServiceQuotaExceededException"},
            ("ServiceQuotaExceededException",),
        ),
        ({"x-bce-error-code": "rpm_rate_limit_exceeded"}, ("rpm_rate_limit_exceeded",)),
    ],
)
def test_code_is_found_in_a_header(headers: dict[str, str], expected: tuple[str, ...]) -> None:
    assert codes(b'{"message":"m"}', headers) == expected


def test_code_of_a_body_that_is_cut_off_is_found() -> None:
    data = b'{"error":{"code":"insufficient_quota","type":"x","message":"' + b"m" * 5000
    assert codes(data)[0] == "insufficient_quota"


def test_words_inside_of_a_text_are_no_codes() -> None:
    message = 'you sent {"code": "insufficient_quota"}'
    whole = orjson.dumps({"error": {"message": message, "type": "server_error"}})
    assert codes(whole) == ("server_error",)
    assert codes(whole[:-1]) == ("server_error",)


def test_google_s_delay_is_read() -> None:
    details = [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerMinute", "quotaValue": "10"}],
        },
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "46.2s"},
    ]
    body = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}}
    told = read_refusal(orjson.dumps(body), NO_HEADERS)
    assert told == Told(("429", "RESOURCE_EXHAUSTED"), 46.2, is_used_up=False)
    assert read_refusal(orjson.dumps([body]), NO_HEADERS) == told


@pytest.mark.parametrize(
    "violation",
    [
        {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "quotaValue": "50"},
        {"quotaId": "GenerateRequestsPerMinute", "quotaValue": "0"},
    ],
)
def test_google_s_daily_or_empty_quota_is_used_up(violation: dict[str, str]) -> None:
    details = [{"violations": [violation]}, {"retryDelay": "5s"}]
    told = read_refusal(orjson.dumps({"error": {"details": details}}), NO_HEADERS)
    assert told.is_used_up


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    read_refusal(data, NO_HEADERS)
    read_refusal(b'{"error":' + data + b"}", NO_HEADERS)
    read_refusal(b"data: " + data, NO_HEADERS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "error",
                    "code",
                    "type",
                    "details",
                    "violations",
                    "retryDelay",
                    "Response",
                    "Error",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(JSON)
def test_no_shape_makes_it_fail(value: object) -> None:
    read_refusal(orjson.dumps(value), NO_HEADERS)
