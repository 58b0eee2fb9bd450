"""Chat completions: `chat.completion.chunk` events and the `chat.completion` they amount to.

Source: OpenAI API reference, Chat completions; types of openai-python 3.54. `reasoning_content`
(DeepSeek, Qwen, GLM) and `reasoning` (vLLM, Ollama) are texts as `content` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from filters.algo.restream.events import Fields, cut, need, only
from filters.algo.restream.openai_chunks import finish, read_chunks, write_chunks
from sidecar.api import Event, Usage

CHUNK, ANSWER = "chat.completion.chunk", "chat.completion"

_TEXTS = ("reasoning_content", "reasoning", "refusal", "content")
"""In the order in which they are streamed."""
_LISTS = ("annotations", "tool_calls")
_MESSAGE = frozenset({"role", "function_call", *_TEXTS, *_LISTS})
_DELTA_CHOICE = frozenset({"index", "delta", "logprobs", "finish_reason"})
_CHOICE = frozenset({"index", "message", "logprobs", "finish_reason"})
_LOGPROBS = frozenset({"content", "refusal"})
_FUNCTION = frozenset({"name", "arguments"})
_CALL = frozenset({"index", "id", "type", "function"})


def whole(events: list[Event], usage: Usage | None) -> Fields:
    choices: dict[int, _Choice] = {}
    answer = read_chunks(events, CHUNK, ANSWER, partial(_take, choices))
    return finish(answer, {index: each.whole() for index, each in choices.items()}, usage)


def _take(choices: dict[int, _Choice], choice: Fields) -> None:
    index = choice["index"]
    found = choices.get(index)
    if found is None:
        found = choices[index] = _Choice(index)
    found.take(choice)


class _Choice:
    """One choice, as far as it has come."""

    __slots__ = ("_call", "_calls", "_finish", "_index", "_logprobs", "_message", "_texts")

    def __init__(self, index: int) -> None:
        self._index = index
        self._message: Fields = {"role": "assistant", "content": None}
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, _Call] = {}
        self._call: _Call | None = None  # a `function_call`, as tool calls were before
        self._logprobs: Fields = {}
        self._finish: Any = None

    def take(self, choice: Fields) -> None:
        only(choice, _DELTA_CHOICE)
        delta = choice["delta"]
        only(delta, _MESSAGE)
        for name, value in delta.items():
            if name in _TEXTS:
                if value is None:
                    self._message.setdefault(name, None)
                elif name in self._texts:
                    self._texts[name].append(value)
                else:
                    self._message[name] = None
                    self._texts[name] = [value]
            elif name == "role":
                need(not value or value == "assistant")
            elif value is None:
                if name in _MESSAGE:
                    self._message.setdefault(name, None)
            elif name == "function_call":
                self._call = self._call or _Call()
                self._call.take_function(value)
            else:
                need(type(value) is list)
                before = self._message[name] = self._message.get(name) or []
                if name == "tool_calls":
                    self._take_calls(value)
                else:
                    before.extend(value)
        logprobs = choice.get("logprobs")
        if logprobs is not None:
            self._take_logprobs(logprobs)
        elif "logprobs" in choice:
            self._logprobs.setdefault("logprobs", None)
        reason = choice.get("finish_reason")
        if reason is not None:
            need(self._finish is None or self._finish == reason)
            self._finish = reason

    def _take_calls(self, deltas: list[Fields]) -> None:
        for delta in deltas:
            only(delta, _CALL)
            index = delta["index"]
            call = self._calls.get(index)
            if call is None:
                call = self._calls[index] = _Call()
            call.take(delta)

    def _take_logprobs(self, logprobs: Fields) -> None:
        only(logprobs, _LOGPROBS)
        told: Fields = self._logprobs.get("logprobs") or {}
        self._logprobs["logprobs"] = told
        for name, tokens in logprobs.items():
            if tokens is None:
                told.setdefault(name, None)
            elif told.get(name) is None:
                told[name] = [*tokens]
            else:
                told[name].extend(tokens)

    def whole(self) -> Fields:
        need(self._finish)
        message = self._message
        for name, pieces in self._texts.items():
            message[name] = "".join(pieces)
        if self._calls:
            need(self._calls.keys() == set(range(len(self._calls))))
            message["tool_calls"] = [
                self._calls[index].whole() for index in range(len(self._calls))
            ]
        if self._call is not None:
            message["function_call"] = self._call.function()
        choice = {"index": self._index, "message": message, **self._logprobs}
        return {**choice, "finish_reason": self._finish}


class _Call:
    """One call of a tool, as far as it has come."""

    __slots__ = ("_arguments", "_id", "_name")

    def __init__(self) -> None:
        self._id = ""
        self._name = ""
        self._arguments: list[str] = []

    def take(self, delta: Fields) -> None:
        need(delta.get("type") in (None, "", "function"))
        call_id = delta.get("id")
        if call_id:
            need(not self._id or call_id == self._id)
            self._id = call_id
        function = delta.get("function")
        if function is not None:
            self.take_function(function)

    def take_function(self, function: Fields) -> None:
        only(function, _FUNCTION)
        name = function.get("name")
        if name:
            need(not self._name)  # the rest of it, or the same again?
            self._name = name
        arguments = function.get("arguments")
        if arguments is not None:
            self._arguments.append(arguments)

    def function(self) -> Fields:
        need(self._name)
        return {"name": self._name, "arguments": "".join(self._arguments)}

    def whole(self) -> Fields:
        need(self._id)
        return {"id": self._id, "type": "function", "function": self.function()}


def stream(answer: Fields, include_usage: bool) -> Iterator[bytes]:
    return write_chunks(answer, ANSWER, CHUNK, include_usage, _say)


def _say(choice: Fields) -> Iterator[Fields]:
    only(choice, _CHOICE)
    message = choice["message"]
    only(message, _MESSAGE)
    need(message["role"] == "assistant")
    logprobs = choice.get("logprobs")
    tail: Fields = {"logprobs": None} if "logprobs" in choice else {}
    tail["finish_reason"] = None
    said = {"index": choice["index"]}

    first: Fields = {"role": "assistant"}
    for name, value in message.items():
        if name in _TEXTS:
            need(value is None or type(value) is str)
            first[name] = value and ""
        elif name in _LISTS and not value:
            first[name] = value
        elif name == "function_call" and value is None:
            first[name] = None
    yield {**said, "delta": first, **tail}
    if logprobs is not None:  # they belong to the tokens, which nobody may tear from their text
        only(logprobs, _LOGPROBS)
        texts = {name: message[name] for name in _TEXTS if message.get(name)}
        yield {**said, "delta": texts, **tail, "logprobs": logprobs}
    else:
        for name in _TEXTS:
            for piece in cut(message.get(name) or ""):
                yield {**said, "delta": {name: piece}, **tail}
    for index, call in enumerate(message.get("tool_calls") or ()):
        only(call, _CALL)
        need(call.get("index", index) == index)  # some providers number them here as well
        need(call["type"] == "function" and call["id"])
        for function in _say_function(call["function"]):
            delta = {"index": index, "function": function}
            if "name" in function:
                delta = {"index": index, "id": call["id"], "type": "function", "function": function}
            yield {**said, "delta": {"tool_calls": [delta]}, **tail}
    if message.get("function_call") is not None:
        for function in _say_function(message["function_call"]):
            yield {**said, "delta": {"function_call": function}, **tail}
    if message.get("annotations"):
        yield {**said, "delta": {"annotations": message["annotations"]}, **tail}
    yield {**said, "delta": {}, **tail, "finish_reason": choice["finish_reason"]}


def _say_function(function: Fields) -> Iterator[Fields]:
    only(function, _FUNCTION)
    need(function["name"])
    yield {"name": function["name"], "arguments": ""}
    for piece in cut(function["arguments"]):
        yield {"arguments": piece}
