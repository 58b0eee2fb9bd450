"""What a refusal says in its own words: the provider's codes, and a delay in its body.

Providers put their code in ten different places, as text or number, in JSON, in the first event of
a stream, or in a header. Here they are found; what they mean is for `retry_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from filters.algo.http_time import Fields
from filters.algo.reset_time import duration_s

PLACES = (
    ("error", "code"),  # OpenAI and those who speak like it, Zhipu, Ark, Spark
    ("error", "type"),  # OpenAI, Anthropic
    ("error", "status"),  # Gemini
    ("error", "details", "error_code"),  # Anthropic
    ("error_code",),  # Qianfan v1
    ("code",),  # DashScope, Spark, Bedrock, older pages of Qianfan v2
    ("__type",),  # AWS
    ("Response", "Error", "Code"),  # Tencent Cloud API 3.0
    ("ErrorMsg", "Code"),  # the same, inside a stream
    ("ResponseMetadata", "Error", "Code"),  # Volcengine's control plane
)
"""Where a body may have a code."""

CODE_HEADERS = ("x-amzn-errortype", "x-bce-error-code")

_CUT_CODES = re.compile(
    rb'"(?:error_code|code|type|status|__type|Code)"\s*:\s*(?:"([^"\\]{1,100})"|(-?[0-9]{1,12})\b)'
)


class Told(NamedTuple):
    """What a refusal said."""

    codes: tuple[str, ...] = ()
    """The provider's words for it, numbers as text."""
    delay_s: float | None = None
    """Gemini's `retryDelay`."""
    is_used_up: bool = False
    """Gemini: the day's quota, or one of 0. No wait that a caller has helps."""


def read_refusal(data: bytes, headers: Fields) -> Told:
    """What the beginning of a body, decompressed, and its headers say. Never raises.

    A body that is cut off, or no JSON at the end, still tells its codes.
    """
    codes = [code for name in CODE_HEADERS if (code := _bare(headers.get(name) or ""))]
    body = _first_object(data)
    if body is None:
        found = _CUT_CODES.findall(data) if data.lstrip()[:1] in (b"{", b"[") else ()
        codes += [(text or number).decode("utf-8", "replace") for text, number in found]
        return Told(tuple(codes))
    codes += [code for place in PLACES if (code := _text(_at(body, place)))]
    delay_s, is_used_up = _google_details(_at(body, ("error", "details")))
    return Told(tuple(codes), delay_s, is_used_up)


def _first_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that is the body, its first line, or the data of its first event."""
    data = data.strip()
    texts = [data]
    if data[:1] not in (b"{", b"["):
        texts = [_first_data(data)]
    elif b"\n" in data:
        texts.append(data.partition(b"\n")[0])
    for text in texts:
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, list) and value:  # Gemini wraps errors so on some paths
            value = value[0]
        if isinstance(value, dict):
            return value
    return None


def _first_data(stream: bytes) -> bytes:
    """The data of a stream's first event that has any."""
    for event in stream.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            return b"\n".join(lines)
    return b""


def _at(value: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return _bare(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _bare(code: str) -> str:
    """AWS writes `namespace#Code:http://…` (botocore strips it the same way)."""
    if "#" in code or ":" in code:
        code = code.partition(":")[0].rpartition("#")[2]
    return code.strip()


def _google_details(details: Any) -> tuple[float | None, bool]:
    """`retryDelay`, and whether a quota is used up that opens tomorrow, or never. Source: Gemini
    API, google.rpc.RetryInfo and google.rpc.QuotaFailure in `error.details`."""
    delay_s, is_used_up = None, False
    for detail in details if isinstance(details, list) else ():
        if not isinstance(detail, dict):
            continue
        delay = detail.get("retryDelay")
        if isinstance(delay, str):
            delay_s = duration_s(delay)
        for each in _dicts(detail.get("violations")):
            is_used_up |= "PerDay" in str(each.get("quotaId", ""))
            is_used_up |= str(each.get("quotaValue", "")) == "0"
    return delay_s, is_used_up


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    return (each for each in (value if isinstance(value, list) else ()) if isinstance(each, dict))
