"""Answers in DashScope's dialect: text and multimodal generation, text embeddings, errors.

Pure builders: request bytes and settings in, `Answer` out. Formats are those of Alibaba Cloud Model
Studio's API reference and official SDK. How an answer is framed, delayed or cut is left to `wire`.
No tools are called.
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
    text_of,
    unit_vector,
)
from sidecar.mock.script import Settings

REQUEST_ID_HEADER = "x-request-id"
TEXT_PATH = "/api/v1/services/aigc/text-generation/generation"
MULTIMODAL_PATH = "/api/v1/services/aigc/multimodal-generation/generation"
EMBEDDING_PATH = "/api/v1/services/embeddings/text-embedding/text-embedding"
PATHS = frozenset((TEXT_PATH, MULTIMODAL_PATH, EMBEDDING_PATH))

_HEADERS = (("x-dashscope-call-gateway", "true"), ("req-cost-time", "12"))
_JSON_HEADERS = (("content-type", "application/json"), *_HEADERS)
_STREAM_HEADERS = (("content-type", "text/event-stream;charset=UTF-8"), *_HEADERS)

#: status -> code, message. Statuses not listed are taken by their class.
_ERRORS: dict[int, tuple[str, str]] = {
    400: ("InvalidParameter", "Required parameter is missing or invalid."),
    401: ("InvalidApiKey", "Invalid API-key provided."),
    402: ("Arrearage", "Access denied, please make sure your account is in good standing."),
    403: ("AccessDenied", "Access denied."),
    404: ("ModelNotFound", "Model can not be found."),
    429: ("Throttling.RateQuota", "Requests rate limit exceeded, please try again later."),
    500: ("InternalError", "An internal error has occurred, please try again later."),
    503: ("ServiceUnavailable", "The service is temporarily unavailable."),
    504: ("RequestTimeOut", "Request timed out, please try again later."),
}
_DEFAULT_DIMENSIONS = 8
_MAX_DIMENSIONS = 4096
_RUNNING = "null"  # the text, as long as there is more to come


def asks_stream(header: str, accept: str) -> bool:
    """Whether the headers `X-DashScope-SSE` and `Accept` ask for a stream; the body never does."""
    return header.strip().lower() == "enable" or "text/event-stream" in accept


def answer(path: str, body: bytes, settings: Settings, *, is_stream: bool) -> Answer:
    """The answer to a POST on one of `PATHS`; a request that is wrong gets its 400."""
    try:
        data = read_object(body)
        if path == EMBEDDING_PATH:
            return _embeddings(data, settings)
        return _generation(data, settings, is_text=path == TEXT_PATH, is_stream=is_stream)
    except BadRequestError as error:
        return make_error(400, settings=Settings(), message=error.message)


def make_error(status: int, *, settings: Settings, message: str | None = None) -> Answer:
    """An error body: `{code, message, request_id}`."""
    error = _error_object(status, settings, message)
    error["request_id"] = REQUEST_ID_MARK.decode()
    return Answer(status, _JSON_HEADERS, REQUEST_ID_HEADER, body=orjson.dumps(error))


def _error_object(status: int, settings: Settings, message: str | None = None) -> JsonObject:
    code, text = _ERRORS.get(status) or _ERRORS[400 if status < 500 else 500]
    return {"code": settings.error_code or code, "message": message or text}


def _object_of(data: JsonObject, name: str) -> JsonObject:
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def _generation(data: JsonObject, settings: Settings, *, is_text: bool, is_stream: bool) -> Answer:
    model = required_text(data, "model")
    given, parameters = _object_of(data, "input"), _object_of(data, "parameters")
    if is_text and "messages" not in given:
        said = text_of(given.get("prompt"))
        if not said:
            raise BadRequestError('Either "prompt" or "messages" must exist.')
        input_tokens = count_words(said)
    else:
        messages = required_messages(given)
        said = last_user_text(messages)
        input_tokens = count_words(*(message.get("content") for message in messages))
    if not is_text:
        form = "parts"
    else:
        form = "message" if parameters.get("result_format") == "message" else "text"
    request_id = identity_of(data)
    frame_bytes = len(_frame(1, _output(form, "", _RUNNING), None, request_id)) + 60  # its usage
    content = make_content(
        settings,
        said,
        overhead_bytes=frame_bytes,
        max_tokens=limit_of(parameters, "max_tokens"),
    )
    reason = "length" if content.is_cut else "stop"
    count = len(content.pieces)
    if not is_stream:
        told = tell(settings, 0, input_tokens, count)
        reply = _reply(_output(form, content.text, reason), told, request_id)
        return _plain(settings, reply, model, input_tokens, count, told)
    return _stream(
        settings,
        content,
        form=form,
        reason=reason,
        is_incremental=parameters.get("incremental_output") is True,
        request_id=request_id,
        frame_bytes=frame_bytes,
        model=model,
        input_tokens=input_tokens,
    )


def _stream(
    settings: Settings,
    content: Content,
    *,
    form: str,
    reason: str,
    is_incremental: bool,
    request_id: str,
    frame_bytes: int,
    model: str,
    input_tokens: int,
) -> Answer:
    """A frame a piece and a last one; without `incremental_output` each repeats all so far."""
    pieces = content.pieces
    length, repeated = 0, 0
    for piece in pieces:
        length += len(piece)
        repeated += len(piece) if is_incremental else length
    check_growing(repeated + frame_bytes * len(pieces))
    events, told = [], []
    text = ""
    for number, piece in enumerate((*pieces, ""), 1):
        text = piece if is_incremental else text + piece
        is_last = number > len(pieces)
        usage = tell(settings, number, input_tokens, min(number, len(pieces)))
        output = _output(form, text, reason if is_last else _RUNNING)
        events.append(_frame(number, output, usage, request_id))
        if usage is not None:
            told.append(usage)
    error = orjson.dumps(_error_object(500, settings) | {"request_id": request_id})
    return Answer(
        settings.status or 200,
        _STREAM_HEADERS,
        REQUEST_ID_HEADER,
        events=tuple(events),
        error_event=b"event:error\n:HTTP_STATUS/500\ndata:" + error + b"\n\n",
        model=model,
        input_tokens=input_tokens,
        output_tokens=len(pieces),
        told=tuple(told),
    )


def _plain(
    settings: Settings,
    reply: JsonObject,
    model: str,
    input_tokens: int,
    output_tokens: int,
    told: Told | None,
) -> Answer:
    return Answer(
        settings.status or 200,
        _JSON_HEADERS,
        REQUEST_ID_HEADER,
        body=orjson.dumps(reply),
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        told=(told,) if told else (),
    )


def _output(form: str, text: str, reason: str) -> JsonObject:
    if form == "text":
        return {"text": text, "finish_reason": reason}
    content: object = text
    if form == "parts":
        content = [{"text": text}] if text else []
    message = {"role": "assistant", "content": content}
    return {"choices": [{"message": message, "finish_reason": reason}]}


def _reply(output: JsonObject, told: Told | None, request_id: str) -> JsonObject:
    reply: JsonObject = {"output": output}
    if told is not None:
        reply["usage"] = {
            "input_tokens": told.input_tokens,
            "output_tokens": told.output_tokens,
            "total_tokens": told.input_tokens + told.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
    return reply | {"request_id": request_id}


def _frame(number: int, output: JsonObject, told: Told | None, request_id: str) -> bytes:
    data = orjson.dumps(_reply(output, told, request_id))
    return b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%b\n\n" % (number, data)


def _embeddings(data: JsonObject, settings: Settings) -> Answer:
    model = required_text(data, "model")
    texts = _object_of(data, "input").get("texts")
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts:
        raise BadRequestError('Required parameter "texts" is missing or invalid.')
    dimensions = limit_of(_object_of(data, "parameters"), "dimension") or _DEFAULT_DIMENSIONS
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise BadRequestError(f"dimension: {dimensions} is not supported.")
    embeddings = [
        {"text_index": index, "embedding": unit_vector(orjson.dumps(text), dimensions)}
        for index, text in enumerate(texts)
    ]
    input_tokens = count_words(*texts)
    reply: JsonObject = {"output": {"embeddings": embeddings}}
    told = tell(settings, 0, input_tokens, 0)
    if told is not None:
        told = told._replace(output_tokens=0)  # there is no field for them
        reply["usage"] = {"total_tokens": told.input_tokens}
    reply["request_id"] = identity_of(data)
    return _plain(settings, reply, model, input_tokens, 0, told)
