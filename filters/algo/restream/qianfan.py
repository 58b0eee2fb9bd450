"""Qianfan v1 (ERNIE): frames that end with `is_end`, and the answer that they amount to.

Source: Baidu AI Cloud, Qianfan API reference v1, Chat. Every frame has the next part of the result
and the usage so far.
"""

from __future__ import annotations

from collections.abc import Iterator

from filters.algo.restream.events import Fields, cut, need, object_of, only, write
from sidecar.api import Event, Usage

_ANSWER = frozenset(
    {
        *("id", "object", "created", "result", "is_truncated", "need_clear_history"),
        *("finish_reason", "usage", "flag", "ban_round"),
    }
)
_PLACE = ("sentence_id", "is_end")
"""Fields that only tell where a frame stands in its stream."""
_FRAME = _ANSWER | {*_PLACE}


def whole(events: list[Event], usage: Usage | None) -> Fields:
    need(events)
    answer: Fields = {}
    results = []
    is_over = False
    for event in events:
        need(not is_over)
        frame = object_of(event)
        only(frame, _FRAME)
        results.append(frame["result"])
        is_over = frame["is_end"] is True
        need(answer.setdefault("id", frame.get("id")) == frame.get("id"))
        answer.update((name, value) for name, value in frame.items() if value is not None)
    need(is_over)
    for name in _PLACE:
        answer.pop(name, None)
    answer["result"] = "".join(results)
    if usage is not None and "usage" not in answer:
        answer["usage"] = {
            "prompt_tokens": usage.input,
            "completion_tokens": usage.output,
            "total_tokens": usage.input + usage.output,
        }
    return answer


def stream(answer: Fields, include_usage: bool) -> Iterator[bytes]:
    only(answer, _FRAME)  # some answers say that they are one sentence, the last
    pieces = list(cut(answer["result"])) or [""]
    last = len(pieces) - 1
    for number, piece in enumerate(pieces):
        place = {"sentence_id": number, "is_end": number == last}
        yield write({**answer, **place, "result": piece})
