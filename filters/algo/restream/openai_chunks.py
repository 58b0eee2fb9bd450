"""What the chunks of chat and of plain completions have in common: head, usage and end.

Source: OpenAI API reference, Chat completions (streaming) and Completions; types of
openai-python 3.54. Compatible providers differ in the fields that they leave null or out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from filters.algo.restream.events import DONE, Fields, need, object_of, only, write
from sidecar.api import Event, Usage

HEAD = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
_HEAD = frozenset(HEAD)
_ANSWER = frozenset({*HEAD, "choices", "usage"})


def read_chunks(
    events: list[Event], chunk_object: str, answer_object: str, take: Callable[[Any], None]
) -> Fields:
    """The answer's fields but its choices, which are shown to `take` one by one as they come."""
    need(events and events.pop().data == b"[DONE]")
    answer: Fields = {}
    usage = head = None
    for event in events:
        chunk = object_of(event)
        need(event.raw[:6] == b"data: " or event.name == b"message")
        choices, told = chunk.pop("choices"), chunk.pop("usage", None)
        chunk.pop("obfuscation", None)  # random padding
        if chunk != head:  # nearly always they are the same
            head = chunk
            _take_head(answer, head, chunk_object)
        for choice in choices:
            take(choice)
        if told is not None:
            usage = told  # cumulative where several chunks report it
    answer["object"] = answer_object
    if usage is not None:
        answer["usage"] = usage
    return answer


def _take_head(answer: Fields, head: Fields, chunk_object: str) -> None:
    only(head, _HEAD)
    need(head.get("object", chunk_object) == chunk_object)
    for name in HEAD:
        if name in head:
            value, before = head[name], answer.get(name)
            if before is None:
                answer[name] = value
            elif value != before and value is not None and name != "created":
                need(name not in ("id", "object", "model"))
                answer[name] = value  # the service tier is known only later


def finish(answer: Fields, choices: dict[int, Fields], usage: Usage | None) -> Fields:
    """The whole answer, with its choices by their index."""
    need(choices and choices.keys() == set(range(len(choices))))
    answer["choices"] = [choices[index] for index in range(len(choices))]
    if usage is not None and "usage" not in answer:
        answer["usage"] = {
            "prompt_tokens": usage.input,
            "completion_tokens": usage.output,
            "total_tokens": usage.input + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        }
    return answer


def write_chunks(
    answer: Fields,
    answer_object: str,
    chunk_object: str,
    include_usage: bool,
    say: Callable[[Fields], Iterator[Fields]],
) -> Iterator[bytes]:
    """The events of `answer`; `say` makes of a choice the choices of its chunks."""
    only(answer, _ANSWER)
    need(answer.get("object", answer_object) == answer_object)
    chunk: Fields = {name: answer[name] for name in HEAD if name in answer}
    chunk["object"] = chunk_object
    usage = answer.get("usage") if include_usage else None
    tail = {} if usage is None else {"usage": None}
    choices = answer["choices"]
    need(choices and [each["index"] for each in choices] == [*range(len(choices))])
    for choice in choices:
        need(choice["finish_reason"])
        for each in say(choice):
            yield write({**chunk, "choices": [each], **tail})
    if usage is not None:
        yield write({**chunk, "choices": [], "usage": usage})
    yield DONE
