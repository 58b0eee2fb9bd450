"""Responses: the events of a response and the object that its last one holds.

Source: OpenAI API reference, Responses (streaming events); types of openai-python 3.54.
"""

from __future__ import annotations

from collections.abc import Iterator

from filters.algo.restream.events import Fields, cut, need, object_of, write
from sidecar.api import Event, Usage

_STATUSES = frozenset({"completed", "incomplete"})
_LIFE = frozenset({"response.created", "response.queued", "response.in_progress"})
_KNOWN = (
    *("response.output_item.", "response.content_part.", "response.output_text."),
    *("response.refusal.", "response.function_call_arguments.", "response.reasoning_"),
    *("response.custom_tool_call_input.", "response.web_search_call.", "response.mcp_"),
    *("response.file_search_call.", "response.code_interpreter_call"),
)
"""How the events begin whose outcome stands in the last one."""
_UNTIL_THE_END = ("usage", "completed_at", "error", "incomplete_details")
"""Fields of a response that are null while it is being made."""


def whole(events: list[Event], usage: Usage | None) -> Fields:
    if events and events[-1].data == b"[DONE]":
        events.pop()
    need(events)
    last = events.pop()
    end = object_of(last)
    answer: Fields = end["response"]
    need(answer["status"] in _STATUSES and end["type"] == f"response.{answer['status']}")
    need(answer["object"] == "response" and type(answer["output"]) is list)
    need(answer.get("error") is None)
    for event in events:
        kind = event.name.decode()
        if kind == "message":  # it has no name beside the one in its data
            kind = object_of(event)["type"]
        need(kind in _LIFE or kind.startswith(_KNOWN))
    if usage is not None and answer.get("usage") is None:
        answer["usage"] = {
            "input_tokens": usage.input,
            "input_tokens_details": {
                "cached_tokens": usage.cached,
                "cache_write_tokens": usage.cache_write,
            },
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.input + usage.output,
        }
    return answer


def stream(answer: Fields, include_usage: bool) -> Iterator[bytes]:
    need(answer["object"] == "response" and answer["status"] in _STATUSES)
    need(answer.get("error") is None and type(answer["output"]) is list)
    for number, event in enumerate(_say(answer)):
        kind = event["type"]
        yield write({**event, "sequence_number": number}, kind)


def _say(answer: Fields) -> Iterator[Fields]:
    started = {**answer, "status": "in_progress", "output": []}
    started.update((name, None) for name in _UNTIL_THE_END if name in answer)
    yield {"type": "response.created", "response": started}
    yield {"type": "response.in_progress", "response": started}
    for index, item in enumerate(answer["output"]):
        place = {"item_id": item["id"], "output_index": index}
        first, events = _ITEMS[item["type"]](item, place)
        if "status" in item:
            first["status"] = "in_progress"
        yield {"type": "response.output_item.added", "output_index": index, "item": first}
        yield from events
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{answer['status']}", "response": answer}


# Of one item: how it begins, and the events until its end...


def _message(item: Fields, place: Fields) -> tuple[Fields, Iterator[Fields]]:
    return {**item, "content": []}, _message_events(item["content"], place)


def _message_events(parts: list[Fields], place: Fields) -> Iterator[Fields]:
    for index, part in enumerate(parts):
        where = {**place, "content_index": index}
        need(part["type"] in ("output_text", "refusal"))
        is_text = part["type"] == "output_text"
        first = {**part, "text": "", "annotations": []} if is_text else {**part, "refusal": ""}
        if "logprobs" in part:
            first["logprobs"] = part["logprobs"] and []
        yield {"type": "response.content_part.added", **where, "part": first}
        yield from _text(part, where) if is_text else _refusal(part, where)
        yield {"type": "response.content_part.done", **where, "part": part}


def _text(part: Fields, where: Fields) -> Iterator[Fields]:
    logprobs = [
        {
            "token": each["token"],
            "logprob": each["logprob"],
            "top_logprobs": [
                {"token": other["token"], "logprob": other["logprob"]}
                for other in each.get("top_logprobs") or ()
            ],
        }
        for each in part.get("logprobs") or ()
    ]
    # They belong to the tokens, which nobody may tear from their text.
    pieces = [part["text"]] if logprobs else cut(part["text"])
    kind = "response.output_text."
    for piece in pieces:
        yield {"type": f"{kind}delta", **where, "delta": piece, "logprobs": logprobs}
    for index, annotation in enumerate(part.get("annotations") or ()):
        numbered = {**where, "annotation_index": index, "annotation": annotation}
        yield {"type": f"{kind}annotation.added", **numbered}
    yield {"type": f"{kind}done", **where, "text": part["text"], "logprobs": logprobs}


def _refusal(part: Fields, where: Fields) -> Iterator[Fields]:
    return _growing("response.refusal", "refusal", part["refusal"], where)


def _function_call(item: Fields, place: Fields) -> tuple[Fields, Iterator[Fields]]:
    events = _growing("response.function_call_arguments", "arguments", item["arguments"], place)
    return {**item, "arguments": ""}, events


def _custom_tool_call(item: Fields, place: Fields) -> tuple[Fields, Iterator[Fields]]:
    events = _growing("response.custom_tool_call_input", "input", item["input"], place)
    return {**item, "input": ""}, events


def _reasoning(item: Fields, place: Fields) -> tuple[Fields, Iterator[Fields]]:
    first = {**item, "summary": []}
    if item.get("content") is not None:
        first["content"] = []
    return first, _reasoning_events(item, place)


def _reasoning_events(item: Fields, place: Fields) -> Iterator[Fields]:
    kind = "response.reasoning_summary_"
    for index, part in enumerate(item["summary"]):
        where = {**place, "summary_index": index}
        yield {"type": f"{kind}part.added", **where, "part": {**part, "text": ""}}
        yield from _growing(f"{kind}text", "text", part["text"], where)
        yield {"type": f"{kind}part.done", **where, "part": part}
    for index, part in enumerate(item.get("content") or ()):
        where = {**place, "content_index": index}
        yield {"type": "response.content_part.added", **where, "part": {**part, "text": ""}}
        yield from _growing("response.reasoning_text", "text", part["text"], where)
        yield {"type": "response.content_part.done", **where, "part": part}


def _growing(kind: str, name: str, text: str, where: Fields) -> Iterator[Fields]:
    for piece in cut(text):
        yield {"type": f"{kind}.delta", **where, "delta": piece}
    yield {"type": f"{kind}.done", **where, name: text}


_ITEMS = {
    "message": _message,
    "function_call": _function_call,
    "custom_tool_call": _custom_tool_call,
    "reasoning": _reasoning,
}
