"""Answers in OpenAI's dialect: chat, completions, embeddings, responses, models, errors.

Pure builders: request bytes and settings in, `Answer` out. Formats are those of OpenAI's API
reference and official SDK. How an answer is framed, delayed or cut is left to `wire`.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable

import orjson

from sidecar.mock.content import (
    CREATED_S,
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
    text_of,
    unit_vector,
)
from sidecar.mock.script import Settings

REQUEST_ID_HEADER = "x-request-id"
MODELS_PATH = "/v1/models"
DONE = b"data: [DONE]\n\n"

_HEADERS = (
    ("openai-organization", "org-mock"),
    ("openai-processing-ms", "12"),
    ("openai-version", "2020-10-01"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("x-ratelimit-reset-requests", "6ms"),
)
_JSON_HEADERS = (("content-type", "application/json"), *_HEADERS)
_STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    *_HEADERS,
)

#: status -> type, code, message. Statuses not listed are taken by their class.
_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "Your request was not valid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Not allowed."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests per min."),
    500: ("server_error", None, "The server had an error while processing your request."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
_PIECE_MARK = b'"\\u0000"'  # how JSON spells a text no request's own field can end up as here
_PIECE = "\0"
_MODELS = ("gpt-4o", "gpt-4o-mini", "text-embedding-3-small", "mock")
_DEFAULT_DIMENSIONS = 8
_MAX_DIMENSIONS = 4096


def answer(path: str, body: bytes, settings: Settings) -> Answer:
    """The answer to a POST on one of `PATHS`; a request that is wrong gets its 400."""
    try:
        return _BUILDERS[path](read_object(body), settings)
    except BadRequestError as error:
        return make_error(400, settings=Settings(), message=error.message, param=error.param)


def models(settings: Settings) -> Answer:
    """The answer to a GET on `MODELS_PATH`."""
    listed = [
        {"id": name, "object": "model", "created": CREATED_S, "owned_by": "mock"}
        for name in _MODELS
    ]
    return _plain(settings, {"object": "list", "data": listed})


def make_error(
    status: int, *, settings: Settings, message: str | None = None, param: str | None = None
) -> Answer:
    """An error body: `{"error": {message, type, param, code}}`."""
    error = _error_object(status, settings, message, param)
    return Answer(status, _JSON_HEADERS, REQUEST_ID_HEADER, body=orjson.dumps({"error": error}))


def _error_object(
    status: int, settings: Settings, message: str | None = None, param: str | None = None
) -> JsonObject:
    kind, code, text = _ERRORS.get(status) or _ERRORS[400 if status < 500 else 500]
    return {
        "message": message or text,
        "type": settings.error_type or kind,
        "param": param,
        "code": settings.error_code or code,
    }


# Shared by the endpoints...


def _plain(
    settings: Settings,
    data: JsonObject,
    *,
    model: str = "",
    input_tokens: int = 0,
    output_tokens: int = 0,
    told: Told | None = None,
) -> Answer:
    return Answer(
        settings.status or 200,
        _JSON_HEADERS,
        REQUEST_ID_HEADER,
        body=orjson.dumps(data),
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        told=(told,) if told else (),
    )


def _stream(
    settings: Settings,
    events: list[bytes],
    *,
    model: str,
    input_tokens: int,
    output_tokens: int,
    content_start: int,
    told: Told | None,
    error_event: bytes | None = None,
) -> Answer:
    return Answer(
        settings.status or 200,
        _STREAM_HEADERS,
        REQUEST_ID_HEADER,
        events=tuple(events),
        error_event=error_event or _data({"error": _error_object(500, settings)}),
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        content_start=content_start,
        told=(told,) if told else (),
    )


def _data(value: JsonObject) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _usage(told: Told) -> JsonObject:
    """Usage of chat and completions."""
    return {
        "prompt_tokens": told.input_tokens,
        "completion_tokens": told.output_tokens,
        "total_tokens": told.input_tokens + told.output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _wants_usage_event(data: JsonObject) -> bool:
    options = data.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


# /v1/chat/completions


def _chat(data: JsonObject, settings: Settings) -> Answer:
    model = required_text(data, "model")
    messages = required_messages(data)
    input_tokens = count_words(*(message.get("content") for message in messages))
    identity = "chatcmpl-" + identity_of(data)
    call = None if settings.text is not None else _chat_tool_call(data, messages, identity)
    chunk: JsonObject = {
        "id": identity,
        "object": "chat.completion.chunk",
        "created": CREATED_S,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_mock",
    }
    with_usage = _wants_usage_event(data)
    if with_usage and settings.usage != "none":
        chunk["usage"] = None
    template = _data(_chat_choice(chunk, {"content": _PIECE}, None))
    content = make_content(
        settings,
        last_user_text(messages),
        overhead_bytes=len(template) - len(_PIECE_MARK) + 2,
        max_tokens=limit_of(data, "max_completion_tokens", "max_tokens"),
    )
    pieces = call.pieces if call else content.pieces
    finish = "tool_calls" if call else "length" if content.is_cut else "stop"

    if data.get("stream") is not True:
        message: JsonObject = {"role": "assistant", "content": content.text, "refusal": None}
        if call:
            message |= {"content": None, "tool_calls": [_chat_call(call, call.arguments)]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        reply = chunk | {"object": "chat.completion", "choices": [choice]}
        reply.pop("usage", None)
        told = tell(settings, 0, input_tokens, len(pieces))
        if told:
            reply["usage"] = _usage(told)
        return _plain(
            settings,
            reply,
            model=model,
            input_tokens=input_tokens,
            output_tokens=len(pieces),
            told=told,
        )

    first: JsonObject = {"role": "assistant", "content": "", "refusal": None}
    events = [_data(_chat_choice(chunk, first, None))]
    if call:
        opening: JsonObject = {"tool_calls": [{"index": 0} | _chat_call(call, "")]}
        growing: JsonObject = {"tool_calls": [{"index": 0, "function": {"arguments": _PIECE}}]}
        events = [
            _data(_chat_choice(chunk, first | {"content": None}, None)),
            _data(_chat_choice(chunk, opening, None)),
        ]
        template = _data(_chat_choice(chunk, growing, None))
    content_start = len(events)
    events += encode_pieces(pieces, template, _PIECE_MARK)
    events.append(_data(_chat_choice(chunk, {}, finish)))
    told = tell(settings, len(events) + 1, input_tokens, len(pieces)) if with_usage else None
    if told:
        events.append(_data(chunk | {"choices": [], "usage": _usage(told)}))
    events.append(DONE)
    return _stream(
        settings,
        events,
        model=model,
        input_tokens=input_tokens,
        output_tokens=len(pieces),
        content_start=content_start,
        told=told,
    )


def _chat_choice(chunk: JsonObject, delta: JsonObject, finish: str | None) -> JsonObject:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return chunk | {"choices": [choice]}


def _chat_call(call: ToolCall, arguments: str) -> JsonObject:
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _chat_tool_call(data: JsonObject, messages: list[JsonObject], identity: str) -> ToolCall | None:
    """The tool the model calls, if it calls one: not after a tool's result, nor if told not to."""
    choice = data.get("tool_choice")
    if messages[-1].get("role") == "tool" or choice == "none":
        return None
    tools = data.get("tools")
    functions = [
        tool["function"]
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    if isinstance(choice, dict) and isinstance(wanted := choice.get("function"), dict):
        functions = [one for one in functions if one.get("name") == wanted.get("name")]
    if not functions:
        return None
    function = functions[0]
    call_id = "call_" + identity.rpartition("-")[2]
    return make_tool_call(
        str(function.get("name", "")), function.get("parameters"), call_id=call_id
    )


# /v1/completions


def _completions(data: JsonObject, settings: Settings) -> Answer:
    model = required_text(data, "model")
    if "prompt" not in data:
        raise BadRequestError("Missing required parameter: 'prompt'.", param="prompt")
    prompt = text_of(data["prompt"])
    input_tokens = count_words(prompt)
    base: JsonObject = {
        "id": "cmpl-" + identity_of(data),
        "object": "text_completion",
        "created": CREATED_S,
        "model": model,
    }
    template = _data(_completion_choice(base, _PIECE, None))
    content = make_content(
        settings,
        prompt,
        overhead_bytes=len(template) - len(_PIECE_MARK) + 2,
        max_tokens=limit_of(data, "max_tokens"),
    )
    finish = "length" if content.is_cut else "stop"
    output_tokens = len(content.pieces)
    if data.get("stream") is not True:
        told = tell(settings, 0, input_tokens, output_tokens)
        reply = _completion_choice(base, content.text, finish)
        return _plain(
            settings,
            reply | ({"usage": _usage(told)} if told else {}),
            model=model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            told=told,
        )
    events = list(encode_pieces(content.pieces, template, _PIECE_MARK))
    events.append(_data(_completion_choice(base, "", finish)))
    wants_usage = _wants_usage_event(data)
    told = tell(settings, len(events) + 1, input_tokens, output_tokens) if wants_usage else None
    if told:
        events.append(_data(base | {"choices": [], "usage": _usage(told)}))
    events.append(DONE)
    return _stream(
        settings,
        events,
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        content_start=0,
        told=told,
    )


def _completion_choice(base: JsonObject, text: str, finish: str | None) -> JsonObject:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return base | {"choices": [choice]}


# /v1/embeddings


def _embeddings(data: JsonObject, settings: Settings) -> Answer:
    model = required_text(data, "model")
    given = data.get("input")
    if given is None or given in ("", []):
        raise BadRequestError("Missing required parameter: 'input'.", param="input")
    # A list of numbers is one input in tokens; a list of anything else is many inputs.
    is_many = isinstance(given, list) and not isinstance(given[0], int)
    inputs: list[object] = given if isinstance(given, list) and is_many else [given]
    dimensions = limit_of(data, "dimensions") or _DEFAULT_DIMENSIONS
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise BadRequestError(f"Invalid 'dimensions': {dimensions}.", param="dimensions")
    as_base64 = data.get("encoding_format") == "base64"
    items = []
    for index, one in enumerate(inputs):
        vector = unit_vector(orjson.dumps(one), dimensions)
        packed = struct.pack(f"<{dimensions}f", *vector)
        embedding: object = base64.b64encode(packed).decode() if as_base64 else vector
        items.append({"object": "embedding", "index": index, "embedding": embedding})
    # A token input is counted by its tokens, a text by its words.
    input_tokens = sum(len(one) if isinstance(one, list) else count_words(one) for one in inputs)
    reply: JsonObject = {"object": "list", "data": items, "model": model}
    told = tell(settings, 0, input_tokens, 0)
    if told:
        told = told._replace(output_tokens=0)  # "wrong" would make it seven; the body has none
        reply["usage"] = {"prompt_tokens": told.input_tokens, "total_tokens": told.input_tokens}
    return _plain(settings, reply, model=model, input_tokens=input_tokens, told=told)


# /v1/responses


def _responses(data: JsonObject, settings: Settings) -> Answer:
    model = required_text(data, "model")
    given = data.get("input")
    if given is None or given in ("", []):
        raise BadRequestError("Missing required parameter: 'input'.", param="input")
    items = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    said = given if isinstance(given, str) else last_user_text(items)
    input_tokens = count_words(given, data.get("instructions"))
    item_id = "msg_" + identity_of(data)
    delta: JsonObject = {
        "type": "response.output_text.delta",
        "item_id": item_id,
        "output_index": 0,
        "content_index": 0,
        "logprobs": [],
    }
    content = make_content(
        settings,
        said,
        overhead_bytes=len(_named(delta | {"delta": "", "sequence_number": 1000})),
        max_tokens=limit_of(data, "max_output_tokens"),
    )
    output_tokens = len(content.pieces)
    started: JsonObject = {
        "id": "resp_" + identity_of(data),
        "object": "response",
        "created_at": CREATED_S,
        "status": "in_progress",
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": data.get("instructions"),
        "metadata": {},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": None,
    }
    message: JsonObject = {"id": item_id, "type": "message", "role": "assistant"}
    part: JsonObject = {"type": "output_text", "text": content.text, "annotations": []}
    told = tell(settings, 0, input_tokens, output_tokens)
    finished = started | _response_end(content, told)
    finished["output"] = [message | {"status": finished["status"], "content": [part]}]
    if data.get("stream") is not True:
        return _plain(
            settings,
            finished,
            model=model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            told=told,
        )

    place: JsonObject = {"item_id": item_id, "output_index": 0, "content_index": 0}
    opening: list[JsonObject] = [
        {"type": "response.created", "response": started},
        {"type": "response.in_progress", "response": started},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": message | {"status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
    ]
    closing: list[JsonObject] = [
        {"type": "response.output_text.done", **place, "text": content.text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": message | {"status": finished["status"], "content": [part]},
        },
        {"type": f"response.{finished['status']}", "response": finished},
    ]
    deltas = [delta | {"delta": piece} for piece in content.pieces]
    error = _error_object(500, settings)
    error_event: JsonObject = {
        "type": "error",
        "code": error["code"] or "server_error",
        "message": error["message"],
        "param": None,
        "sequence_number": settings.error_event or 0,
    }
    events = [
        _named(event | {"sequence_number": number})
        for number, event in enumerate([*opening, *deltas, *closing])
    ]
    return _stream(
        settings,
        events,
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        content_start=len(opening),
        told=told._replace(event=len(events)) if told else None,
        error_event=_named(error_event),
    )


def _response_end(content: Content, told: Told | None) -> JsonObject:
    """The fields of a response that its end decides."""
    end: JsonObject = {"status": "completed"}
    if content.is_cut:
        end = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    if told:
        end["usage"] = {
            "input_tokens": told.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": told.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": told.input_tokens + told.output_tokens,
        }
    return end


def _named(event: JsonObject) -> bytes:
    """An event with its name on a line of its own, as the Responses API sends it."""
    return f"event: {event['type']}\n".encode() + _data(event)


_BUILDERS: dict[str, Callable[[JsonObject, Settings], Answer]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/embeddings": _embeddings,
    "/v1/responses": _responses,
}
PATHS = frozenset(_BUILDERS)
