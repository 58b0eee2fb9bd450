"""Anthropic's messages: the events of a message and the message they amount to.

Source: Anthropic API reference, Messages and Streaming messages; types of anthropic-python 2.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from filters.algo.exact_json import is_exact
from filters.algo.restream.events import Fields, Unsayable, cut, need, object_of, only, write
from sidecar.api import Event, Usage

_BLOCKS = frozenset(
    {
        *("text", "thinking", "redacted_thinking", "tool_use", "server_tool_use", "mcp_tool_use"),
        *("web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
        *("bash_code_execution_tool_result", "text_editor_code_execution_tool_result"),
        *("tool_search_tool_result", "mcp_tool_result", "container_upload"),
    }
)
"""Blocks that say in their start, and in the deltas below, all that they say in a whole message."""
_WITH_INPUT = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
_END = ("stop_reason", "stop_sequence", "stop_details", "container")
"""Fields of a message that are known at its end."""
_END_EVENT = frozenset({"type", "delta", "usage"})
_END_USAGE = (
    *("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"),
    *("output_tokens", "output_tokens_details", "server_tool_use"),
)
"""Figures that the end reports (again); the others stand at the start."""
_UNTIL_THE_END = ("output_tokens_details", "server_tool_use")
_DELTAS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
    "citations_delta": "citation",
}
"""Kinds of deltas, and the field that each of them has."""


def whole(events: list[Event], usage: Usage | None) -> Fields:
    need(events)
    start = object_of(events[0])
    while start["type"] == "ping":
        events.pop(0)
        start = object_of(events[0])
    need(start["type"] == "message_start")
    only(start, frozenset({"type", "message"}))
    message: Fields = start["message"]
    need(message["content"] == [])
    blocks: list[_Block] = []
    is_open = is_over = False
    for event in events[1:]:
        need(not is_over)
        value = object_of(event)
        kind = value["type"]
        if kind == "content_block_delta":
            need(is_open and value["index"] == len(blocks) - 1)
            blocks[-1].take(value["delta"])
        elif kind == "content_block_start":
            need(not is_open and value["index"] == len(blocks))
            blocks.append(_Block(value["content_block"]))
            is_open = True
        elif kind == "content_block_stop":
            need(is_open and value["index"] == len(blocks) - 1)
            is_open = False
        elif kind == "message_delta":
            need(not is_open)
            _take_end(message, value)
        elif kind == "message_stop":
            is_over = True
        else:
            need(kind == "ping")
    need(is_over and not is_open and message["stop_reason"])
    message["content"] = [block.whole() for block in blocks]
    if usage is not None and message.get("usage") is None:
        message["usage"] = {
            "input_tokens": usage.input - usage.cached - usage.cache_write,
            "cache_creation_input_tokens": usage.cache_write,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.output,
        }
    return message


def _take_end(message: Fields, event: Fields) -> None:
    only(event, _END_EVENT)
    delta = event["delta"]
    only(delta, frozenset(_END))
    for name in _END:
        if delta.get(name) is not None:
            message[name] = delta[name]
        elif name in delta:
            message.setdefault(name, None)
    figures = event.get("usage")
    if figures is not None:
        told = message.get("usage") or {}
        message["usage"] = told
        for name, value in figures.items():  # cumulative, but what was told before may be missing
            if value is not None:
                told[name] = value
            else:
                told.setdefault(name, None)


class _Block:
    """One block of content, as far as it has come."""

    __slots__ = ("_block", "_pieces")

    def __init__(self, block: Fields) -> None:
        need(block["type"] in _BLOCKS)
        self._block = block
        self._pieces: dict[str, list[Any]] = {}

    def take(self, delta: Fields) -> None:
        kind = delta["type"]
        name = _DELTAS.get(kind)
        if name is None:
            raise Unsayable
        only(delta, frozenset({"type", name}))
        pieces = self._pieces.get(name)
        if pieces is None:
            pieces = self._pieces[name] = []
        pieces.append(delta[name])

    def whole(self) -> Fields:
        block, pieces = self._block, self._pieces
        kind = block["type"]
        for name in ("text", "thinking"):
            if name in pieces:
                need(kind == name)
                block[name] += "".join(pieces.pop(name))
        if "signature" in pieces:
            signatures = [*filter(None, pieces.pop("signature"))]
            need(kind == "thinking" and not block.get("signature") and len(signatures) <= 1)
            block["signature"] = "".join(signatures)
        if "citation" in pieces:
            need(kind == "text")
            block["citations"] = [*(block.get("citations") or ()), *pieces.pop("citation")]
        if "partial_json" in pieces:
            need(kind in _WITH_INPUT)
            written = "".join(pieces.pop("partial_json")).encode()
            if written:
                need(block["input"] == {})
                block["input"] = orjson.loads(written)
                need(type(block["input"]) is dict and is_exact(written, block["input"]))
        return block


def stream(answer: Fields, include_usage: bool) -> Iterator[bytes]:
    for event in _say(answer):
        yield write(event, event["type"])


def _say(message: Fields) -> Iterator[Fields]:
    need(message["type"] == "message" and message["stop_reason"])
    need(message.get("context_management") is None)  # only some SDKs take it from the end
    usage = message["usage"]
    at_start = {**usage, "output_tokens": min(1, usage["output_tokens"])}
    at_start.update((name, None) for name in _UNTIL_THE_END if name in usage)
    start = {**message, "content": [], "usage": at_start}
    start.update((name, None) for name in _END if name in message)
    yield {"type": "message_start", "message": start}
    for index, block in enumerate(message["content"]):
        need(block["type"] in _BLOCKS)
        first, deltas = _say_block(block)
        yield {"type": "content_block_start", "index": index, "content_block": first}
        for kind, values in deltas:
            for value in values:
                delta = {"type": kind, _DELTAS[kind]: value}
                yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    end = {name: message[name] for name in _END if name in message}
    at_end = {name: usage[name] for name in _END_USAGE if name in usage}
    yield {"type": "message_delta", "delta": end, "usage": at_end}
    yield {"type": "message_stop"}


def _say_block(block: Fields) -> tuple[Fields, list[tuple[str, Any]]]:
    """How a block begins, and its deltas by their kind."""
    kind = block["type"]
    if kind == "text":
        first = {**block, "text": ""}
        citations = block.get("citations")
        if citations:
            first["citations"] = []
        return first, [("text_delta", cut(block["text"])), ("citations_delta", citations or ())]
    if kind == "thinking":
        first = {**block, "thinking": ""}
        if "signature" in block:
            first["signature"] = ""
        signature = filter(None, (block.get("signature"),))
        thinking = cut(block["thinking"])
        return first, [("thinking_delta", thinking), ("signature_delta", signature)]
    if kind in _WITH_INPUT:
        need(type(block["input"]) is dict)
        # A tool without arguments gets an empty piece, as the provider sends it.
        pieces = cut(orjson.dumps(block["input"]).decode()) if block["input"] else ("",)
        return {**block, "input": {}}, [("input_json_delta", pieces)]
    return block, []
