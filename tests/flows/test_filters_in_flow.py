"""What filters do to a call, as its client sees it on the wire."""

from __future__ import annotations

import pytest
from flow_filters import AttemptEnds

from sidecar.call import Outcome
from tests.support.flow import Flow, Start, chat_request, request
from tests.support.upstream import RawUpstream

EVENT = b'data: {"choices":[]}\n\n'
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


async def with_filter(start: Start, name: str, more: str = "") -> Flow:
    chain = f"call: [access_log, 'flow_filters:{name}'], attempt: ['flow_filters:AttemptEnds']"
    return await start(f"chains: {{default: {{{chain}}}}}\n{more}")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("FailsLate", 500, "internal_error"), ("RefusesLate", 451, "not_for_you")],
)
async def test_a_filter_that_fails_with_a_reply_in_its_hand_leaks_nothing(
    start: Start, name: str, status: int, code: str, stream: bool
) -> None:
    flow = await with_filter(start, name)
    flow.may_log_errors = name == "FailsLate"
    answer = await flow.call(chat_request(stream=stream, x_mock_delay_ms="1"))
    assert (answer.status, answer.error["code"]) == (status, code)
    assert "secret" not in repr(answer)
    await flow.quiet()
    assert len(flow.filter(AttemptEnds).ends) == 1


async def test_a_refusal_carries_its_headers_and_a_whole_number_of_seconds(start: Start) -> None:
    flow = await with_filter(start, "Refuses")
    client = await flow.connect()
    for model, kind in (("gpt", "rate_limit_error"), ("claude", "rate_limit_error")):
        answer = await client.call(chat_request(model))
        assert (answer.status, answer.error["code"]) == (429, "too_many")
        assert answer.error["type"] == kind
        assert answer.header("retry-after") == "2"
        assert answer.header("x-why") == "1"
    assert not flow.provider.books.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_a_filter_may_change_the_bytes_and_their_number(start: Start, stream: bool) -> None:
    flow = await with_filter(start, "Doubles")
    client = await flow.connect()
    for framing in ("length", "chunked", "close"):
        answer = await client.call(chat_request(stream=stream, x_mock_body=framing))
        assert answer.is_whole
        body = answer.body.removesuffix(b"the end")
        assert len(body) == len(answer.body) - 7
        assert body[::2] == body[1::2]
        assert body[:2] == (b"dd" if stream else b"{{")


async def test_a_filter_that_fails_while_it_changes_a_stream_breaks_it_off(start: Start) -> None:
    async with RawUpstream() as raw:
        where = f"upstreams: {{up-openai: {{base_url: '{raw.base_url}/v1'}}}}"
        flow = await with_filter(start, "Tears", where)
        flow.may_log_errors = True
        client = await flow.connect()
        client.send(chat_request(stream=True))
        connection = await raw.accept()
        await connection.read_request()
        connection.write(STREAM_HEAD + b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
        await client.until(EVENT)
        connection.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
        data = await client.rest()
        assert b'"code":"internal_error"' in data
        assert b"secret" not in data
        assert not data.endswith(b"0\r\n\r\n")
        await connection.closed()
        (line,) = await flow.logged()
        assert line["outcome"] == "aborted"
        assert not any(end.upstream_fault for end in flow.filter(AttemptEnds).ends)


async def test_a_filter_that_fails_while_it_changes_a_whole_answer_gives_500(
    start: Start,
) -> None:
    flow = await with_filter(start, "Tears")
    flow.may_log_errors = True
    answer = await flow.call(chat_request())
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert b"secret" not in answer.body
    (line,) = await flow.logged()
    assert line["outcome"] == "aborted"


async def test_a_filter_may_ask_twice(start: Start) -> None:
    flow = await with_filter(start, "Twice")
    for stream in (False, True):
        answer = await flow.call(chat_request(stream=stream))
        assert (answer.status, answer.is_whole) == (200, True)
    outcomes = [end.outcome for end in flow.filter(AttemptEnds).ends]
    assert outcomes == [Outcome.DISCARDED, Outcome.COMPLETED] * 2
    assert [line["attempts"] for line in await flow.logged(2)] == [2, 2]
    first, second, *_ = flow.provider.books.requests
    assert first.body == second.body


async def test_a_filter_may_answer_itself(start: Start) -> None:
    flow = await with_filter(start, "AnswersItself")
    client = await flow.connect()
    for _ in range(2):
        answer = await client.call(chat_request(stream=True))
        assert answer.json == {"made": "here"}
    assert not flow.provider.books.requests
    assert [line["attempts"] for line in await flow.logged(2)] == [0, 0]


async def test_a_filter_that_looks_badly_does_no_harm(start: Start) -> None:
    flow = await with_filter(start, "TapsBadly")
    flow.may_log_errors = True
    plain = await start_without_taps(flow)
    for stream in (False, True):
        answer = await flow.call(chat_request(stream=stream))
        assert answer.is_whole
        assert answer.body == plain[stream]
    dropped = flow.server.snapshot.dropped_taps.value
    assert dropped >= 4


async def start_without_taps(flow: Flow) -> dict[bool, bytes]:
    """What the provider itself sends, by way of a path where no filter looks at events."""
    return {
        stream: (
            await flow.call(
                request(
                    "POST",
                    "/up-openai/chat/completions",
                    chat_request(stream=stream).partition(b"\r\n\r\n")[2],
                )
            )
        ).body
        for stream in (False, True)
    }


async def test_an_error_as_the_first_event_is_a_status_when_one_waits_for_the_event(
    start: Start,
) -> None:
    flow = await start("upstreams: {up-openai: {wait_for: event}}")
    first = await flow.call(chat_request(stream=True, x_mock_error_event="0"))
    later = await flow.call(chat_request(stream=True, x_mock_error_event="2"))
    assert (first.status, first.error["code"]) == (502, "upstream_error_event")
    assert (later.status, later.is_whole) == (200, True)
    outcomes = [line["outcome"] for line in await flow.logged(2)]
    assert outcomes == ["upstream_failed", "completed"]
