"""What answers are made of, whichever the dialect: text, token counts, tool calls, `Answer`.

Everything is a pure function of the request, so equal requests get equal answers. A token is a
word on the way in and a content event on the way out.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import orjson

from sidecar.mock.script import Settings

JsonObject = dict[str, object]

#: Stands in a built answer for the call's own request id, which has the same length.
REQUEST_ID_MARK = b"req_000000000000000000000000"

#: Bodies and events carry this time (Unix seconds), so that equal requests get equal bytes.
CREATED_S = 1_760_000_000

_MAX_GROWING_BYTES = 64 * 1024 * 1024
_EVENT_OF = attrgetter("event")
_WORD = re.compile(r"\s*\S+(?:\s+$)?")
_MAX_SCHEMA_DEPTH = 6


class BadRequestError(Exception):
    """The request cannot be answered: becomes a 400 in the dialect's envelope."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class Told(NamedTuple):
    """Usage as an answer tells it: in a stream, with the event of that number, from 1."""

    event: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer before it is put on the wire: either a body, or the events of a stream.

    `content_start` is the index of the first event that carries an output token; the tokens are
    in consecutive events, one each. `request_id_header` names the header the dialect uses. `told`
    is what the answer says it used, right or wrong; each replaces the one before. `is_refusal` is
    for those who say an error with status 200.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    request_id_header: str
    body: bytes = b""
    events: tuple[bytes, ...] | None = None
    error_event: bytes = b""
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    content_start: int = 0
    told: tuple[Told, ...] = ()
    is_refusal: bool = False

    def tokens_after(self, events: int) -> int:
        """Output tokens a client has seen after that many events of the stream."""
        return max(0, min(events - self.content_start, self.output_tokens))

    def told_after(self, events: int) -> Told | None:
        """The usage a client has been told after that many events of the stream."""
        count = bisect_right(self.told, events, key=_EVENT_OF)
        return self.told[count - 1] if count else None


@dataclass(frozen=True, slots=True)
class Content:
    """The pieces an answer is streamed in; joined, they are what a plain answer holds."""

    pieces: tuple[str, ...]
    is_cut: bool  # by the request's own limit on output tokens

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the request's first (or demanded) tool, its arguments in pieces of JSON."""

    call_id: str
    name: str
    arguments: str
    pieces: tuple[str, ...]


# Reading a request...


def read_object(body: bytes) -> JsonObject:
    """The request body as a JSON object. Raises BadRequestError."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(
            f"We could not parse the JSON body of your request: {error}"
        ) from None
    if not isinstance(data, dict):
        raise BadRequestError("The JSON body of your request is not an object")
    return data


def required_text(data: JsonObject, name: str) -> str:
    """A field that must be non-empty text. Raises BadRequestError."""
    value = data.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"Missing required parameter: '{name}'.", param=name)
    return value


def required_messages(data: JsonObject) -> list[JsonObject]:
    """`messages`: a non-empty list of objects. Raises BadRequestError."""
    value = data.get("messages")
    if not isinstance(value, list) or not value:
        raise BadRequestError("Missing required parameter: 'messages'.", param="messages")
    if not all(isinstance(message, dict) for message in value):
        raise BadRequestError("Invalid 'messages': each must be an object.", param="messages")
    return value


def text_of(content: object) -> str:
    """The text in a message's content: a string, or parts with `text` or nested `content`."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(filter(None, map(text_of, content)))
    if isinstance(content, dict):
        return text_of(content.get("text") or content.get("content"))
    return ""


def last_user_text(messages: list[JsonObject]) -> str:
    for message in reversed(messages):
        if message.get("role") == "user" and (text := text_of(message.get("content"))):
            return text
    return ""


def count_words(*contents: object) -> int:
    return sum(len(text_of(content).split()) for content in contents)


def tell(settings: Settings, event: int, input_tokens: int, output_tokens: int) -> Told | None:
    """The usage as the settings want it told; None when it is to be missing."""
    if settings.usage == "none":
        return None
    if settings.usage == "wrong":
        input_tokens, output_tokens = input_tokens * 10 + 7, output_tokens * 10 + 7
    return Told(event, input_tokens, output_tokens)


def identity_of(data: JsonObject) -> str:
    """24 hex digits that are the same for the same request."""
    return hashlib.blake2b(orjson.dumps(data), digest_size=12).hexdigest()


def limit_of(data: JsonObject, *names: str) -> int | None:
    """The first of these fields that is a whole number."""
    for name in names:
        if isinstance(value := data.get(name), int):
            return value
    return None


# Making an answer...


def default_text(said: str) -> str:
    """The standard answer: mentions the first 40 characters of what was said."""
    quoted = " ".join(said[:40].split())
    return f'The mock provider read "{quoted}" and answers in a dozen plain words.'


def make_content(
    settings: Settings, said: str, *, overhead_bytes: int, max_tokens: int | None
) -> Content:
    """The answer's text in pieces, one a content event of about `event_bytes` bytes."""
    words = _WORD.findall(settings.text if settings.text is not None else default_text(said))
    is_cut = False
    if settings.events is not None:
        words = _repeat(words or ["mock"], settings.events)
    elif max_tokens is not None and len(words) > max_tokens:
        words, is_cut = words[: max(0, max_tokens)], True
    if settings.event_bytes is not None:
        size = settings.event_bytes - overhead_bytes
        # Each different word once: a long stream of large events must not be held in full.
        padded = {word: word.ljust(size, "x") for word in set(words)}
        words = [padded[word] for word in words]
    return Content(tuple(words), is_cut)


def _repeat(words: list[str], count: int) -> list[str]:
    """Exactly `count` words, round and round; the first of a later round gets its space."""
    if count <= len(words):
        return words[:count]
    following = [" " + word.strip() for word in words]
    rounds = following * (count // len(words))
    return (words[:1] + following[1:] + rounds)[:count]


def encode_pieces(pieces: tuple[str, ...], template: bytes, mark: bytes) -> tuple[bytes, ...]:
    """One event a piece: the template with the piece, as JSON text, where the mark is.

    Equal pieces share one bytes object, so a long stream costs a pointer an event.
    """
    # From the right: a model's name before it may hold anything, what follows is ours.
    head, _, tail = template.rpartition(mark)
    made: dict[str, bytes] = {}
    for piece in pieces:
        if piece not in made:
            made[piece] = head + orjson.dumps(piece) + tail
    return tuple(made[piece] for piece in pieces)


def check_growing(size_bytes: int) -> None:
    """Raises BadRequestError where a stream of events that all differ would fill the memory."""
    if size_bytes > _MAX_GROWING_BYTES:
        raise BadRequestError("so many events of that size are not made here: ask for fewer")


def unit_vector(seed: bytes, dimensions: int) -> list[float]:
    """An embedding: of length 1, and dependent on the seed alone."""
    raw = hashlib.shake_128(seed).digest(dimensions)
    values = [byte - 127.5 for byte in raw]  # never zero, so the norm is not either
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def make_tool_call(name: str, schema: object, *, call_id: str) -> ToolCall:
    """A call with arguments that fit the tool's JSON schema, as far as one can guess."""
    sampled = _sample(schema, schema, 0)
    arguments = orjson.dumps(sampled if isinstance(sampled, dict) else {}).decode()
    pieces = tuple(arguments[at : at + 8] for at in range(0, len(arguments), 8))
    return ToolCall(call_id, name, arguments, pieces)


def _sample(schema: object, root: object, depth: int) -> object:
    """A small value that a JSON schema allows; null where it says nothing we understand."""
    if not isinstance(schema, dict) or depth > _MAX_SCHEMA_DEPTH:
        return None
    if isinstance(ref := schema.get("$ref"), str):
        return _sample(_local_ref(ref, root), root, depth + 1)
    for word in ("const", "default"):
        if word in schema:
            return schema[word]
    for word in ("enum", "examples"):
        if isinstance(values := schema.get(word), list) and values:
            return values[0]
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(word), list) and options:
            return _sample(options[0], root, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list) and kind:
        kind = kind[0]
    if kind == "object" or isinstance(schema.get("properties"), dict):
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return {}
        return {name: _sample(part, root, depth + 1) for name, part in properties.items()}
    if kind == "array":
        return [_sample(schema["items"], root, depth + 1)] if "items" in schema else []
    plain: JsonObject = {"string": "mock", "integer": 1, "number": 1.5, "boolean": True}
    low = schema.get("minimum")
    if kind in ("integer", "number") and isinstance(low, int | float):
        return low
    return plain.get(str(kind))


def _local_ref(ref: str, root: object) -> object:
    """The part of the schema that `#/a/b` points at; None when it points nowhere."""
    part = root
    for step in filter(None, ref.removeprefix("#").split("/")):
        part = part.get(step) if isinstance(part, dict) else None
    return part
