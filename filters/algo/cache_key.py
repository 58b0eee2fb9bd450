"""Which calls may be answered from a cache, and what two of them must have in common.

All that could change an answer is part of the key: who may see it, where it would come from, every
header that goes to the provider and every field of the body. What is left out is listed here, one
by one, so that nothing is ever shared by oversight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson
from multidict import MultiMapping

from filters.algo.exact_json import is_exact
from filters.algo.include_usage import ASKS
from filters.algo.normalise import canonical
from sidecar.api import Call

IGNORED_FIELDS = frozenset(
    {
        "stream",  # an answer is given in either form
        "stream_options",
        "user",  # who asks, for the provider's watch over abuse
        "safety_identifier",
        "metadata",
        "prompt_cache_key",  # where the provider keeps the prompt
        "prompt_cache_retention",
    }
)
"""Fields of a body that do not change the answer."""

IGNORED_HEADERS = frozenset(
    {
        *(b"accept", b"accept-encoding", b"accept-language", b"content-type", b"content-length"),
        *(b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"cookie"),
        *(b"host", b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding"),
        *(b"upgrade", b"expect", b"via", b"forwarded", b"proxy-connection", b"date"),
        *(b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port"),
        *(b"x-real-ip", b"user-agent", b"referer", b"origin", b"priority", b"dnt"),
        *(b"sec-fetch-dest", b"sec-fetch-mode", b"sec-fetch-site"),
        *(b"cache-control", b"pragma", b"x-request-timeout", b"idempotency-key"),
        *(b"x-request-id", b"x-client-request-id", b"traceparent", b"tracestate", b"baggage"),
        *(b"x-dashscope-sse", b"anthropic-dangerous-direct-browser-access"),
    }
)
"""Headers that do not change the answer. Credentials are here because who may see an answer is the
scope's business."""
IGNORED_PREFIX = b"x-stainless-"
"""What the official SDKs tell of themselves."""

NO_ANSWERS = frozenset({"count_tokens", "other", "models", "pass_through"})
"""Endpoints whose answers are not kept: free, or of no known meaning."""
CHANGING_FIELDS = (
    *("previous_response_id", "conversation", "background"),
    *("web_search_options", "enable_search", "search_parameters", "plugins", "mcp_servers"),
    "container",
)
"""The answer depends on what the provider remembers, or comes later (OpenAI responses); or on the
world as it is then: searches (OpenAI, Alibaba Cloud, xAI, OpenRouter), servers, a machine
(Anthropic)."""
KNOWN_BYTES, MAX_KNOWN = 4096, 256
"""Of bodies whose canonical form is remembered: what is asked again comes as the same bytes."""
MAX_BODY_BYTES = 256 * 1024
"""A longer request is not for a cache: its key would hold up other calls for milliseconds."""


def _is_zero(temperature: Any) -> bool:
    return (type(temperature) is int or type(temperature) is float) and temperature == 0


def _are_the_caller_s(tools: Any) -> bool:
    """Whether the caller runs all of these tools itself. The provider's own see the world."""
    if not isinstance(tools, list):
        return False
    for tool in tools:
        kind = tool.get("type", "custom") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            return False
    return True


class Wish(NamedTuple):
    """What a request's `Cache-Control` asks for (RFC 9111, 5.2.1)."""

    may_store: bool = True
    max_age_s: float | None = None
    """The oldest answer it takes; None: any. 0: none (`no-cache`)."""


ANY = Wish()
FRESH = Wish(max_age_s=0.0)


def read_wish(headers: MultiMapping[str]) -> Wish:
    """The directives that matter here; others are passed over."""
    if "cache-control" not in headers:
        return FRESH if "no-cache" in headers.get("pragma", "").lower() else ANY
    may_store, max_age_s = True, None
    for directive in ",".join(headers.getall("cache-control")).lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name == "no-store":
            may_store = False
        elif name == "no-cache":
            max_age_s = 0.0
        elif name == "max-age":
            digits = value.strip('"')
            if digits.isascii() and digits.isdigit():
                age_s = float(digits)
                max_age_s = age_s if max_age_s is None else min(age_s, max_age_s)
    return Wish(may_store, max_age_s)


def may_repeat(call: Call, any_temperature: bool) -> bool:
    """Whether the same request is meant to have the same answer: temperature 0, or an embedding.

    A temperature that is not named is the provider's, which is not 0.
    """
    endpoint = call.endpoint
    if not endpoint.has_model or endpoint.name in NO_ANSWERS or call.method != "POST":
        return False
    if not call.body or len(call.body) > MAX_BODY_BYTES or not call.targets:
        return False
    fields = call.json
    if not any_temperature and "embedding" not in endpoint.name:
        temperature = fields.get("temperature")
        if temperature is None and isinstance(parameters := fields.get("parameters"), dict):
            temperature = parameters.get("temperature")  # DashScope
        if not _is_zero(temperature):
            return False
    for name in CHANGING_FIELDS:
        if fields.get(name):
            return False
    tools = fields.get("tools")
    return not tools or _are_the_caller_s(tools)


def key_of(
    call: Call,
    parts: Iterable[bytes],
    *,
    skip: frozenset[str] = IGNORED_FIELDS,
    skip_headers: frozenset[bytes] = IGNORED_HEADERS,
    normalise_text: bool = False,
    known: dict[bytes, bytes] | None = None,
) -> str | None:
    """40 hex digits that calls with the same answer have in common; None: its body has no
    canonical form. `parts` are what else must be the same: scope and targets. `known` remembers
    canonical forms for whoever always asks with the same `skip` and `normalise_text`."""
    asked, sent = call.json, call.body or b""
    body = None if known is None else known.get(sent)
    if body is None:
        # One who names a field twice would choose what another caller gets: the last counts here,
        # and perhaps the first at the provider.
        if not is_exact(sent, asked):
            return None
        said = asked
        if _is_zero(asked.get("temperature")):  # 0, 0.0 and -0.0: clients write it as they like
            said = {**asked, "temperature": 0}
        body = canonical(said, skip=skip, normalise_text=normalise_text)
        if body is None:
            return None
        if known is not None and len(sent) <= KNOWN_BYTES:
            if len(known) >= MAX_KNOWN:
                known.clear()
            known[sent] = body
    fields = [
        b"%b:%b" % (name, value)
        for raw_name, value in call.raw_headers
        if (name := raw_name.lower()) not in skip_headers and not name.startswith(IGNORED_PREFIX)
    ]
    if fields:
        fields.sort()
    where = f"{call.path}?{call.query}".encode("utf-8", "surrogateescape")
    pieces = (*parts, where, _form_of_stream(call, asked), *fields)
    # Lengths before the pieces: no two lists of pieces look alike.
    hashed = blake2b(digest_size=20)
    hashed.update(b"".join([b"%d:%b" % (len(piece), piece) for piece in pieces]))
    hashed.update(b"%d|" % len(pieces))
    hashed.update(body)
    return hashed.hexdigest()


def _form_of_stream(call: Call, asked: Mapping[str, Any]) -> bytes:
    """What a stream has besides the answer, as far as `stream_options` say it. A whole answer has
    its usage, as nearly every stream has: `token_counter` asks for it."""
    if call.endpoint.name not in ASKS or not call.is_stream:
        return b"usage"
    options = asked.get("stream_options")
    if not isinstance(options, dict):
        return b"" if options is None else orjson.dumps(options)
    if len(options) == 1 and options.get("include_usage") is True:
        return b"usage"
    return orjson.dumps(options, option=orjson.OPT_SORT_KEYS)


def refusal_key(key: str, call: Call) -> str:
    """The key of a refusal: of the very same request. What does not change an answer may well be
    what is wrong with a request."""
    hashed = blake2b(key.encode(), digest_size=20)
    for name, value in call.raw_headers:
        if name.lower() in _REFUSED_FOR:
            hashed.update(b"%b:%b\n" % (name.lower(), value))
    hashed.update(call.body or b"")
    return hashed.hexdigest()


_REFUSED_FOR = frozenset({b"content-type", b"accept", b"x-dashscope-sse"})


def is_refusal_for_good(status: int, codes: Iterable[str]) -> bool:
    """Whether the same request will be refused the same way again: it is malformed, or asks for
    what is not there. Quota, money and credentials change."""
    if status not in (400, 404, 413, 422):
        return False
    words = " ".join(codes).lower()
    return not any(word in words for word in _PASSING)


_PASSING = (
    *("arrear", "quota", "limit", "throttl", "balance", "overdue", "billing", "credit"),
    *("api_key", "apikey", "auth", "permission", "access", "2003", "expired", "busy"),
)
"""Parts of providers' codes, in answers of 400, for what passes: DashScope `Arrearage`, Hunyuan
`2003`, Bedrock `ServiceQuotaExceededException`."""


def is_finished(dialect: str, endpoint: str, stream: bytes) -> bool:
    """Whether a recorded stream has the end that its API promises. One without may be a part."""
    end = stream[-2048:].rstrip()
    if dialect == "anthropic":
        return b'"message_stop"' in end
    if dialect == "openai":
        if endpoint == "responses":
            return b'"response.completed"' in stream
        return end.endswith(b"[DONE]")
    if dialect == "qianfan":
        return b'"is_end":true' in stream[-65536:].replace(b" ", b"")
    if dialect == "dashscope":
        last = stream[-65536:].replace(b" ", b"")
        at = last.rfind(b'"finish_reason":')
        return at >= 0 and last[at + 16 : at + 22] not in (b'"null"', b"null,")
    return False


def target_part(targets: Iterable[tuple[str, str | None]], places: Mapping[str, str]) -> bytes:
    """Where an answer would come from: each upstream, its address, and the model's name there."""
    return "\n".join(f"{name} {places.get(name)} {model or ''}" for name, model in targets).encode()
