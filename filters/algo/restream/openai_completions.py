"""Plain completions: a stream of `text_completion` objects and the one they amount to.

Source: OpenAI API reference, Completions; types of openai-python 3.54.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from filters.algo.restream.events import Fields, cut, need, only
from filters.algo.restream.openai_chunks import finish, read_chunks, write_chunks
from sidecar.api import Event, Usage

OBJECT = "text_completion"

_CHOICE = frozenset({"index", "text", "logprobs", "finish_reason"})
_LOGPROBS = frozenset({"tokens", "token_logprobs", "top_logprobs", "text_offset"})


def whole(events: list[Event], usage: Usage | None) -> Fields:
    choices: dict[int, Fields] = {}
    texts: dict[int, list[str]] = {}
    answer = read_chunks(events, OBJECT, OBJECT, partial(_take, choices, texts))
    for index, choice in choices.items():
        need(choice["finish_reason"])
        choice["text"] = "".join(texts[index])
    return finish(answer, choices, usage)


def _take(choices: dict[int, Fields], texts: dict[int, list[str]], choice: Fields) -> None:
    only(choice, _CHOICE)
    index = choice["index"]
    found = choices.get(index)
    if found is None:
        found = choices[index] = {"index": index, "text": "", "finish_reason": None}
        texts[index] = []
    texts[index].append(choice["text"])
    reason = choice.get("finish_reason")
    if reason is not None:
        need(found["finish_reason"] is None or found["finish_reason"] == reason)
        found["finish_reason"] = reason
    if "logprobs" in choice:
        found.setdefault("logprobs", None)
        if choice["logprobs"] is not None:
            found["logprobs"] = found["logprobs"] or {}
            _take_logprobs(found["logprobs"], choice["logprobs"])


def _take_logprobs(told: Fields, logprobs: Fields) -> None:
    only(logprobs, _LOGPROBS)
    for name, values in logprobs.items():
        if values is None:
            told.setdefault(name, None)
        elif told.get(name) is None:
            told[name] = [*values]
        else:
            told[name].extend(values)


def stream(answer: Fields, include_usage: bool) -> Iterator[bytes]:
    return write_chunks(answer, OBJECT, OBJECT, include_usage, _say)


def _say(choice: Fields) -> Iterator[Fields]:
    only(choice, _CHOICE)
    text = choice["text"]
    need(type(text) is str)
    said: Fields = {"index": choice["index"]}
    tail: Fields = {"logprobs": None} if "logprobs" in choice else {}
    tail["finish_reason"] = None
    logprobs = choice.get("logprobs")
    if logprobs is not None:  # they belong to the tokens, which nobody may tear from their text
        only(logprobs, _LOGPROBS)
        yield {**said, "text": text, **tail, "logprobs": logprobs}
    else:
        for piece in cut(text):
            yield {**said, "text": piece, **tail}
    yield {**said, "text": "", **tail, "finish_reason": choice["finish_reason"]}
