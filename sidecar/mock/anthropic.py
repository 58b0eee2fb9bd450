"""Answers in Anthropic's dialect: messages, token counts, errors.

Pure builders: request bytes and settings in, `Answer` out. Formats are those of Anthropic's API
reference and official SDK. How an answer is framed, delayed or cut is left to `wire`.
"""

from __future__ import annotations

import orjson

from sidecar.mock.content import (
    REQUEST_ID_MARK,
    Answer,
    BadRequestError,
    Content,
    JsonObject,
    Told,
    ToolCall,
    count_words,
    encode_pieces,
    identity_of,
    last_user_text,
    limit_of,
    make_content,
    make_tool_call,
    read_object,
    required_messages,
    required_text,
    tell,
)
from sidecar.mock.script import Settings

REQUEST_ID_HEADER = "request-id"
MESSAGES_PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
PATHS = frozenset((MESSAGES_PATH, COUNT_PATH))

_HEADERS = (
    ("anthropic-organization-id", "00000000-0000-4000-8000-000000000000"),
    ("anthropic-ratelimit-requests-limit", "4000"),
    ("anthropic-ratelimit-requests-remaining", "3999"),
    ("anthropic-ratelimit-requests-reset", "2030-01-01T00:00:00Z"),
)
_JSON_HEADERS = (("content-type", "application/json"), *_HEADERS)
_STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    *_HEADERS,
)

#: status -> type, message. Statuses not listed are taken by their class.
_ERRORS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "Your request was not valid."),
    401: ("authentication_error", "invalid x-api-key"),
    402: ("billing_error", "Your credit balance is too low."),
    403: ("permission_error", "Your API key may not use this resource."),
    404: ("not_found_error", "The model does not exist."),
    409: ("conflict_error", "The resource is in use."),
    413: ("request_too_large", "Request exceeds the maximum size."),
    429: ("rate_limit_error", "This request would exceed your rate limit."),
    500: ("api_error", "Internal server error"),
    504: ("timeout_error", "The request timed out."),
    529: ("overloaded_error", "Overloaded"),
}
_PIECE_MARK = b'"\\u0000"'  # how JSON spells a text no request's own field can end up as here
_PIECE = "\0"
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def answer(path: str, body: bytes, settings: Settings) -> Answer:
    """The answer to a POST on one of `PATHS`; a request that is wrong gets its 400."""
    try:
        data = read_object(body)
        model = required_text(data, "model")
        messages = required_messages(data)
        if path == COUNT_PATH:
            return _plain(settings, {"input_tokens": _count_input(data, messages)}, model=model)
        return _messages(data, model, messages, settings)
    except BadRequestError as error:
        return make_error(400, settings=Settings(), message=error.message)


def make_error(status: int, *, settings: Settings, message: str | None = None) -> Answer:
    """An error body: `{"type": "error", "error": {type, message, details?}, "request_id"}`.

    The request id is a mark that the server replaces by the call's own, so that body and header
    agree as they do at the provider.
    """
    body = _error_object(status, settings, message)
    body["request_id"] = REQUEST_ID_MARK.decode()
    return Answer(status, _JSON_HEADERS, REQUEST_ID_HEADER, body=orjson.dumps(body))


def _error_object(status: int, settings: Settings, message: str | None = None) -> JsonObject:
    kind, text = _ERRORS.get(status) or _ERRORS[400 if status < 500 else 500]
    error: JsonObject = {"type": settings.error_type or kind, "message": message or text}
    if settings.error_code is not None:
        error["details"] = {"error_code": settings.error_code}
    return {"type": "error", "error": error}


def _plain(
    settings: Settings,
    data: JsonObject,
    *,
    model: str,
    input_tokens: int = 0,
    output_tokens: int = 0,
    told: tuple[Told, ...] = (),
) -> Answer:
    return Answer(
        settings.status or 200,
        _JSON_HEADERS,
        REQUEST_ID_HEADER,
        body=orjson.dumps(data),
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        told=told,
    )


def _messages(
    data: JsonObject, model: str, messages: list[JsonObject], settings: Settings
) -> Answer:
    input_tokens = _count_input(data, messages)
    digest = identity_of(data)
    call = None if settings.text is not None else _tool_call(data, messages, digest)
    template = _delta("text_delta", "text")
    content = make_content(
        settings,
        last_user_text(messages),
        overhead_bytes=len(template) - len(_PIECE_MARK) + 2,
        max_tokens=limit_of(data, "max_tokens"),
    )
    pieces = call.pieces if call else content.pieces
    reason = "tool_use" if call else "max_tokens" if content.is_cut else "end_turn"
    message: JsonObject = {
        "id": "msg_" + digest,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    if data.get("stream") is not True:
        finished = message | {"content": [_block(call, content)], "stop_reason": reason}
        whole = tell(settings, 0, input_tokens, len(pieces))
        return _plain(
            settings,
            finished | _usage(whole),
            model=model,
            input_tokens=input_tokens,
            output_tokens=len(pieces),
            told=(whole,) if whole else (),
        )

    # At the start the provider tells a small first output count; the last one is what counts.
    at_start = tell(settings, 1, input_tokens, min(1, len(pieces)))
    first = message | _usage(at_start)
    opening: JsonObject = {"type": "text", "text": ""}
    if call:
        opening = {"type": "tool_use", "id": call.call_id, "name": call.name, "input": {}}
        template = _delta("input_json_delta", "partial_json")
    events = [
        _named({"type": "message_start", "message": first}),
        _named({"type": "content_block_start", "index": 0, "content_block": opening}),
        _PING,
    ]
    content_start = len(events)
    events += encode_pieces(pieces, template, _PIECE_MARK)
    end: JsonObject = {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": None},
    }
    at_end = tell(settings, len(events) + 2, input_tokens, len(pieces))
    events += [
        _named({"type": "content_block_stop", "index": 0}),
        _named(end | _usage(at_end)),
        _named({"type": "message_stop"}),
    ]
    return Answer(
        settings.status or 200,
        _STREAM_HEADERS,
        REQUEST_ID_HEADER,
        events=tuple(events),
        error_event=_named(_error_object(529, settings)),
        model=model,
        input_tokens=input_tokens,
        output_tokens=len(pieces),
        content_start=content_start,
        told=tuple(filter(None, (at_start, at_end))),
    )


def _block(call: ToolCall | None, content: Content) -> JsonObject:
    """The one content block of a plain answer."""
    if call is None:
        return {"type": "text", "text": content.text}
    made = orjson.loads(call.arguments)
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": made}


def _tool_call(data: JsonObject, messages: list[JsonObject], digest: str) -> ToolCall | None:
    """The tool the model calls, if it calls one: not after a tool's result, nor if told not to."""
    content = messages[-1].get("content")
    if isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") == "tool_result" for part in content
    ):
        return None
    given = data.get("tools")
    tools = [tool for tool in (given if isinstance(given, list) else []) if isinstance(tool, dict)]
    choice = data.get("tool_choice")
    if isinstance(choice, dict):
        if choice.get("type") == "none":
            return None
        if choice.get("type") == "tool":
            tools = [tool for tool in tools if tool.get("name") == choice.get("name")]
    if not tools:
        return None
    name, schema = str(tools[0].get("name", "")), tools[0].get("input_schema")
    return make_tool_call(name, schema, call_id="toolu_" + digest)


def _count_input(data: JsonObject, messages: list[JsonObject]) -> int:
    return count_words(data.get("system"), *(message.get("content") for message in messages))


def _usage(told: Told | None) -> JsonObject:
    """The field `usage`, or nothing when it is to be missing. In a stream it is cumulative."""
    if told is None:
        return {}
    return {
        "usage": {
            "input_tokens": told.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": told.output_tokens,
        }
    }


def _delta(kind: str, field: str) -> bytes:
    """The template of a content event, its piece still to be filled in."""
    delta = {"type": kind, field: _PIECE}
    return _named({"type": "content_block_delta", "index": 0, "delta": delta})


def _named(event: JsonObject) -> bytes:
    return f"event: {event['type']}\n".encode() + b"data: " + orjson.dumps(event) + b"\n\n"
