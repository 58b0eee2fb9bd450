"""The official SDKs as parsers: what they make of a whole answer, and of a stream.

Their clients read from memory, through the transport that their HTTP library has for tests: the
bytes pass every line of theirs that bytes of a provider would pass.
"""

from __future__ import annotations

from typing import Any

import anthropic
import httpx2
import openai
from openai.lib.streaming.chat import ChatCompletionStreamState

Fields = dict[str, Any]

QUESTION: Any = [{"role": "user", "content": "?"}]

PARSED = frozenset({"parsed", "parsed_arguments", "parsed_output"})
"""What only their streams add: the same text, parsed."""


class Answers:
    """A provider that gives one answer, whatever it is asked."""

    def __init__(self) -> None:
        self.data = b""
        self.media_type = ""

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": self.media_type}, content=self.data)


ANSWERS = Answers()
_TRANSPORT = httpx2.MockTransport(ANSWERS)
OPENAI = openai.OpenAI(
    api_key="k",
    base_url="http://provider.test/v1",
    max_retries=0,
    http_client=httpx2.Client(transport=_TRANSPORT, trust_env=False),
)
ANTHROPIC = anthropic.Anthropic(
    api_key="k",
    base_url="http://provider.test",
    max_retries=0,
    http_client=httpx2.Client(transport=_TRANSPORT, trust_env=False),
)


def give(data: bytes, media_type: str = "application/json") -> None:
    ANSWERS.data = data
    ANSWERS.media_type = media_type


def give_stream(data: bytes) -> None:
    give(data, "text/event-stream")


def plain(model: Any) -> Any:
    """What an SDK's object says, without nulls and without what it has parsed itself."""
    return _without_nulls(model.model_dump(warnings=False))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_nulls(each)
            for name, each in value.items()
            if each is not None and name not in PARSED
        }
    if isinstance(value, list | tuple):
        return [_without_nulls(each) for each in value]
    return value


# OpenAI: chat


def chat_from_whole(data: bytes) -> Any:
    give(data)
    return plain(OPENAI.chat.completions.create(model="m", messages=QUESTION))


def chat_from_stream(data: bytes) -> Any:
    """What the SDK puts together. It leaves the place of a tool call in the call."""
    give_stream(data)
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in OPENAI.chat.completions.create(model="m", messages=QUESTION, stream=True):
        state.handle_chunk(chunk)
    found = plain(state.current_completion_snapshot)
    for choice in found["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            call.pop("index", None)
    return found


# OpenAI: completions


def completion_from_whole(data: bytes) -> Any:
    give(data)
    return plain(OPENAI.completions.create(model="m", prompt="?"))


def completion_from_stream(data: bytes) -> Any:
    """The SDK does not put these together, but it reads every event."""
    give_stream(data)
    found: Any = None
    for chunk in OPENAI.completions.create(model="m", prompt="?", stream=True):
        said = plain(chunk)
        if found is None:
            found = {**said, "choices": []}
        if "usage" in said:
            found["usage"] = said["usage"]
        for choice in said["choices"]:
            if choice["index"] == len(found["choices"]):
                found["choices"].append(choice)
                continue
            known = found["choices"][choice["index"]]
            text = known["text"] + choice["text"]
            known.update(choice, text=text)
    return found


# OpenAI: responses


def response_from_whole(data: bytes) -> Any:
    give(data)
    return plain(OPENAI.responses.create(model="m", input="?"))


def response_from_stream(data: bytes) -> Any:
    give_stream(data)
    with OPENAI.responses.stream(model="m", input="?") as stream:
        return plain(stream.get_final_response())


def response_events(data: bytes) -> list[Any]:
    """Every event as the SDK's type of it."""
    give_stream(data)
    return list(OPENAI.responses.create(model="m", input="?", stream=True))


# Anthropic


def message_from_whole(data: bytes) -> Any:
    give(data)
    return plain(ANTHROPIC.messages.create(model="m", max_tokens=9, messages=QUESTION))


def message_from_stream(data: bytes) -> Any:
    give_stream(data)
    with ANTHROPIC.messages.stream(model="m", max_tokens=9, messages=QUESTION) as stream:
        return plain(stream.get_final_message())
