"""Answers in the dialect of Qianfan v1: chat, completions, embeddings, errors.

Pure builders: request bytes and settings in, `Answer` out. Formats are those of Baidu AI Cloud's
API reference (WENXINWORKSHOP) and official SDK: the model stands in the path, and an error comes
with status 200. How an answer is framed, delayed or cut is left to `wire`. No functions are called.
"""

from __future__ import annotations

import orjson

from sidecar.mock.content import (
    CREATED_S,
    REQUEST_ID_MARK,
    Answer,
    BadRequestError,
    JsonObject,
    Told,
    check_growing,
    count_words,
    identity_of,
    last_user_text,
    limit_of,
    make_content,
    read_object,
    required_messages,
    required_text,
    tell,
    unit_vector,
)
from sidecar.mock.script import Settings

REQUEST_ID_HEADER = "x-bce-request-id"
PREFIX = "/rpc/2.0/ai_custom/v1/wenxinworkshop/"

_JSON_HEADERS = (
    ("content-type", "application/json"),
    ("x-ratelimit-limit-requests", "300"),
    ("x-ratelimit-remaining-requests", "299"),
)
_STREAM_HEADERS = (("content-type", "text/event-stream"), *_JSON_HEADERS[1:])

#: status -> error_code, error_msg. Statuses not listed are taken by their class.
_ERRORS: dict[int, tuple[int, str]] = {
    400: (336003, "the parameters are invalid"),
    401: (110, "Access token invalid or no longer valid"),
    402: (17, "Open api daily request limit reached"),
    403: (6, "No permission to access data"),
    404: (336005, "API name not exist"),
    429: (18, "Open api qps request limit reached"),
    500: (336000, "Internal error"),
    503: (336100, "the server is busy, please try again later"),
    504: (2, "Service temporarily unavailable"),
}
_DIMENSIONS = 8


def has_path(path: str) -> bool:
    """Whether something is answered here."""
    kind, _, model = path.removeprefix(PREFIX).partition("/")
    return path.startswith(PREFIX) and kind in _KINDS and bool(model) and "/" not in model


def model_of(path: str) -> str:
    """The model that a path names."""
    return path.rpartition("/")[2]


def answer(path: str, body: bytes, settings: Settings) -> Answer:
    """The answer to a POST on a path that `has_path`; a request that is wrong gets its error."""
    kind, _, model = path.removeprefix(PREFIX).partition("/")
    try:
        data = read_object(body)
        if kind == "embeddings":
            return _embeddings(data, model, settings)
        return _chat(data, model, settings, is_chat=kind == "chat")
    except BadRequestError as error:
        return make_error(400, settings=Settings(), message=error.message)


def make_error(status: int, *, settings: Settings, message: str | None = None) -> Answer:
    """What the provider says in place of that status: 200, and `{error_code, error_msg, id}`."""
    error = _error_object(status, settings, message) | {"id": REQUEST_ID_MARK.decode()}
    body = orjson.dumps(error)
    return Answer(200, _JSON_HEADERS, REQUEST_ID_HEADER, body=body, is_refusal=True)


def _error_object(status: int, settings: Settings, message: str | None = None) -> JsonObject:
    code: object
    code, text = _ERRORS.get(status) or _ERRORS[400 if status < 500 else 500]
    if settings.error_code is not None:
        told = settings.error_code
        code = int(told) if told.isdigit() else told
    return {"error_code": code, "error_msg": message or text}


def _chat(data: JsonObject, model: str, settings: Settings, *, is_chat: bool) -> Answer:
    if is_chat:
        messages = required_messages(data)
        said = last_user_text(messages)
        contents = (data.get("system"), *(message.get("content") for message in messages))
        input_tokens = count_words(*contents)
    else:
        said = required_text(data, "prompt")
        input_tokens = count_words(said)
    base: JsonObject = {
        "id": "as-" + identity_of(data | {"model": model}),
        "object": "chat.completion" if is_chat else "completion",
        "created": CREATED_S,
    }
    event_bytes = len(_event(base, 1, "", told=None)) + 60  # its usage
    content = make_content(
        settings,
        said,
        overhead_bytes=event_bytes,
        max_tokens=limit_of(data, "max_output_tokens"),
    )
    pieces = content.pieces
    if data.get("stream") is not True:
        told = tell(settings, 0, input_tokens, len(pieces))
        reply = base | _result(content.text, is_truncated=content.is_cut, told=told)
        return Answer(
            settings.status or 200,
            _JSON_HEADERS,
            REQUEST_ID_HEADER,
            body=orjson.dumps(reply),
            model=model,
            input_tokens=input_tokens,
            output_tokens=len(pieces),
            told=(told,) if told else (),
        )
    check_growing(event_bytes * len(pieces) + sum(map(len, pieces)))
    usages = [
        tell(settings, number, input_tokens, min(number, len(pieces)))
        for number in range(1, len(pieces) + 2)
    ]
    events = [
        _event(base, number, piece, told=told)
        for number, (piece, told) in enumerate(zip(pieces, usages, strict=False), 1)
    ]
    last = {"is_end": True, "is_truncated": content.is_cut}
    events.append(_event(base, len(events) + 1, "", told=usages[-1], **last))
    error = _error_object(500, settings) | {"id": base["id"]}
    return Answer(
        settings.status or 200,
        _STREAM_HEADERS,
        REQUEST_ID_HEADER,
        events=tuple(events),
        error_event=b"data: " + orjson.dumps(error) + b"\n\n",
        model=model,
        input_tokens=input_tokens,
        output_tokens=len(pieces),
        told=tuple(filter(None, usages)),
    )


def _event(
    base: JsonObject,
    number: int,
    text: str,
    *,
    told: Told | None,
    is_end: bool = False,
    is_truncated: bool = False,
) -> bytes:
    place: JsonObject = {"sentence_id": number - 1, "is_end": is_end}
    event = base | place | _result(text, is_truncated=is_truncated, told=told)
    return b"data: " + orjson.dumps(event) + b"\n\n"


def _result(text: str, *, is_truncated: bool, told: Told | None) -> JsonObject:
    result: JsonObject = {
        "is_truncated": is_truncated,
        "result": text,
        "need_clear_history": False,
        "finish_reason": "length" if is_truncated else "normal",
    }
    return result if told is None else result | {"usage": _usage(told)}


def _usage(told: Told) -> JsonObject:
    return {
        "prompt_tokens": told.input_tokens,
        "completion_tokens": told.output_tokens,
        "total_tokens": told.input_tokens + told.output_tokens,
    }


def _embeddings(data: JsonObject, model: str, settings: Settings) -> Answer:
    texts = data.get("input")
    if not isinstance(texts, list) or not texts:
        raise BadRequestError("the input must be a non-empty list of texts")
    items = [
        {
            "object": "embedding",
            "embedding": unit_vector(orjson.dumps(text), _DIMENSIONS),
            "index": index,
        }
        for index, text in enumerate(texts)
    ]
    input_tokens = count_words(*texts)
    reply: JsonObject = {
        "id": "as-" + identity_of(data | {"model": model}),
        "object": "embedding_list",
        "created": CREATED_S,
        "data": items,
    }
    told = tell(settings, 0, input_tokens, 0)
    if told is not None:
        told = told._replace(output_tokens=0)  # there is no field for them
        reply["usage"] = {"prompt_tokens": told.input_tokens, "total_tokens": told.input_tokens}
    return Answer(
        settings.status or 200,
        _JSON_HEADERS,
        REQUEST_ID_HEADER,
        body=orjson.dumps(reply),
        model=model,
        input_tokens=input_tokens,
        told=(told,) if told else (),
    )


_KINDS = frozenset(("chat", "completions", "embeddings"))
