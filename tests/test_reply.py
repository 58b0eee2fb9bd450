"""Bodies: held, attached, tapped, mapped; and every way in which they end."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import reply as reply_module
from sidecar.call import Outcome
from sidecar.errors import CallError
from sidecar.headers import Headers
from sidecar.reply import Body, Reply
from sidecar.sse import Decoder, Event, EventTooLarge
from tests.support.harness import ScriptedSource, broken

SSE = "text/event-stream"
STREAM = b'data: {"a": 1}\n\ndata: {"b": "\xc3\xa9"}\n\ndata: [DONE]\n\n'


class ListSink:
    """Takes a body; `log` has what happened in its order."""

    def __init__(self, log: list[str] | None = None) -> None:
        self.log = log if log is not None else []
        self.pieces: list[bytes] = []
        self.error: CallError | None = None
        self.is_complete = False

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)

    def write(self, data: bytes) -> None:
        self.log.append(f"write {data.decode('latin-1')}")
        self.pieces.append(data)

    def finish(self) -> None:
        self.log.append("finish")
        self.is_complete = True

    def fail(self, error: CallError) -> None:
        self.log.append("fail")
        self.error = error


class Owner:
    def __init__(self) -> None:
        self.ends: list[tuple[Outcome, CallError | None]] = []

    def body_ended(self, body: Body, outcome: Outcome, error: CallError | None) -> None:
        self.ends.append((outcome, error))


def owned(source: ScriptedSource) -> Owner:
    owner = Owner()
    source.body.owned_by(owner)
    return owner


def piecewise(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def flow(body: Body, source: ScriptedSource, *pieces: bytes) -> ListSink:
    """Attach a sink and feed all of it."""
    sink = ListSink()
    body.attach(sink)
    source.feed(*pieces)
    source.finish()
    return sink


# Held and attached


def test_body_holds_the_first_bytes_and_pauses_its_source() -> None:
    source = ScriptedSource()
    source.feed(b"one")
    assert source.asked == ["pause"]
    assert source.body.peek() == b"one"


def test_what_was_held_is_written_first_and_the_source_resumed() -> None:
    source, sink = ScriptedSource(), ListSink()
    source.feed(b"one", b"two")
    source.body.attach(sink)
    assert sink.pieces == [b"one", b"two"]
    assert not source.is_paused
    source.feed(b"three")
    assert sink.pieces == [b"one", b"two", b"three"]
    assert not source.is_paused


def test_body_that_came_whole_is_complete_when_it_is_attached() -> None:
    source, sink = ScriptedSource(), ListSink()
    owner = owned(source)
    source.feed(b"one")
    source.finish(b"two")
    assert source.body.is_whole
    assert not owner.ends
    source.body.attach(sink)
    assert sink.log == ["write one", "write two", "finish"]
    assert owner.ends == [(Outcome.COMPLETED, None)]


def test_last_bytes_may_come_with_the_end() -> None:
    source, sink = ScriptedSource(), ListSink()
    source.body.attach(sink)
    source.finish(b"all")
    assert sink.log == ["write all", "finish"]


def test_body_without_bytes_completes() -> None:
    source, sink = ScriptedSource(), ListSink()
    owner = owned(source)
    source.body.attach(sink)
    source.finish()
    assert sink.log == ["finish"]
    assert owner.ends == [(Outcome.COMPLETED, None)]


def test_sink_pauses_and_resumes_the_source() -> None:
    source = ScriptedSource()
    source.body.attach(ListSink())
    source.body.pause()
    assert source.is_paused
    source.body.resume()
    assert not source.is_paused


def test_sink_that_aborts_while_it_gets_what_was_held_gets_no_more() -> None:
    source = ScriptedSource()
    owner = owned(source)

    class Leaving(ListSink):
        def write(self, data: bytes) -> None:
            super().write(data)
            source.body.abort(Outcome.CLIENT_GONE)

    sink = Leaving()
    source.feed(b"one", b"two")
    source.body.attach(sink)
    assert sink.pieces == [b"one"]
    assert owner.ends == [(Outcome.CLIENT_GONE, None)]
    assert source.is_aborted


def test_owner_that_comes_late_is_told_the_end() -> None:
    body = Body.of(b"x")
    body.take()
    owner = Owner()
    body.owned_by(owner)
    assert owner.ends == [(Outcome.COMPLETED, None)]


# Ends


@pytest.mark.parametrize("outcome", [Outcome.CLIENT_GONE, Outcome.ABORTED, Outcome.DISCARDED])
@pytest.mark.parametrize("is_attached", [False, True])
def test_aborting_stops_the_source_and_ends_once(outcome: Outcome, is_attached: bool) -> None:
    source, sink = ScriptedSource(), ListSink()
    owner = owned(source)
    source.feed(b"one")
    if is_attached:
        source.body.attach(sink)
    written = list(sink.pieces)
    source.body.abort(outcome)
    source.body.abort(Outcome.ABORTED)
    source.body.discard()
    source.feed(b"two")
    source.finish()
    assert source.asked.count("abort") == 1
    assert sink.pieces == written
    assert not sink.is_complete
    assert sink.error is None
    assert owner.ends == [(outcome, None)]
    assert not source.body.is_whole


def test_failure_while_held_shows_when_it_is_attached() -> None:
    source, sink, error = ScriptedSource(), ListSink(), broken()
    owner = owned(source)
    source.feed(b"one")
    source.fail(error)
    assert not source.body.is_whole
    assert not owner.ends
    source.body.attach(sink)
    assert sink.log == ["write one", "fail"]
    assert sink.error is error
    assert owner.ends == [(Outcome.UPSTREAM_FAILED, error)]


def test_failure_while_flowing_shows_at_once() -> None:
    source, sink, error = ScriptedSource(), ListSink(), broken()
    owner = owned(source)
    source.body.attach(sink)
    source.feed(b"one")
    source.fail(error)
    assert sink.log == ["write one", "fail"]
    assert owner.ends == [(Outcome.UPSTREAM_FAILED, error)]


def test_failed_body_that_nobody_wants_is_discarded() -> None:
    source = ScriptedSource()
    owner = owned(source)
    source.fail(broken())
    source.body.discard()
    assert [outcome for outcome, _ in owner.ends] == [Outcome.DISCARDED]


def test_attaching_to_a_body_that_ended_fails_at_once() -> None:
    """A filter returned what it had discarded: nobody may wait for the rest of it."""
    source, sink = ScriptedSource(), ListSink()
    source.feed(b"one")
    source.body.discard()
    source.body.attach(sink)
    assert sink.log == ["fail"]


# Taps


def test_taps_see_each_piece_before_it_is_written_in_the_order_of_their_registration() -> None:
    log: list[str] = []
    source, sink = ScriptedSource(), ListSink(log)
    source.body.tap_bytes(lambda data: log.append(f"first {data.decode()}"))
    source.body.tap_bytes(lambda data: log.append(f"second {data.decode()}"))
    source.feed(b"1")
    source.body.attach(sink)
    source.feed(b"2")
    source.finish()
    assert log == [
        *("first 1", "second 1", "write 1"),
        *("first 2", "second 2", "write 2"),
        "finish",
    ]


def test_event_taps_see_an_event_before_its_last_bytes_are_written() -> None:
    log: list[str] = []
    source, sink = ScriptedSource(), ListSink(log)
    source.body.tap_events(lambda event: log.append(f"event {event.data.decode()}"))
    source.body.attach(sink)
    source.feed(b"data: 1", b"\n\n")
    assert log == ["write data: 1", "event 1", "write \n\n"]


def test_last_event_without_a_blank_line_is_shown_before_the_end() -> None:
    log: list[str] = []
    source, sink = ScriptedSource(), ListSink(log)
    source.body.tap_events(lambda event: log.append(f"event {event.data.decode()}"))
    source.body.attach(sink)
    source.feed(b"data: 1")
    source.finish()
    assert log == ["write data: 1", "event 1", "finish"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_event_taps_see_the_same_in_pieces_of_any_size(size: int) -> None:
    source = ScriptedSource()
    events: list[Any] = []
    source.body.tap_events(lambda event: events.append(event.data))
    sink = flow(source.body, source, *piecewise(STREAM, size))
    assert sink.data == STREAM
    assert events == [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[Decoder]:
    """Every decoder that a body makes."""
    made: list[Decoder] = []

    class Counted(Decoder):
        def __init__(self, max_event_bytes: int = 8 * 1024 * 1024) -> None:
            super().__init__(max_event_bytes)
            made.append(self)

    monkeypatch.setattr(reply_module, "Decoder", Counted)
    return made


class Upper:
    def feed(self, data: bytes) -> bytes:
        return data.upper()

    def finish(self) -> bytes:
        return b"."


def ignore(event: Event) -> None:
    pass


def test_all_event_taps_of_a_segment_share_one_decoder(decoders: list[Decoder]) -> None:
    source = ScriptedSource()
    for _ in range(3):
        source.body.tap_events(ignore)
    flow(source.body, source, STREAM)
    assert len(decoders) == 1


def test_each_segment_between_maps_has_its_own_decoder(decoders: list[Decoder]) -> None:
    source = ScriptedSource()
    source.body.tap_events(ignore)
    source.body.map(Upper())
    source.body.tap_events(ignore)
    source.body.tap_events(ignore)
    flow(source.body, source, STREAM)
    assert len(decoders) == 2


def test_nobody_decodes_when_nobody_taps_events(decoders: list[Decoder]) -> None:
    source = ScriptedSource()
    source.body.tap_bytes(lambda data: None)
    flow(source.body, source, STREAM)
    plain = ScriptedSource()
    flow(plain.body, plain, STREAM)
    assert not decoders


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"data: 1", b'data: "usage"', b'"usage"', b"\n", b"\n\n", b"\r\n", b": x"]
        ),
        max_size=12,
    ),
    st.data(),
)
def test_tap_for_events_that_contain_something_sees_just_those(
    tokens: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(tokens)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=6).map(sorted))
    pieces = [stream[i:j] for i, j in pairwise([0, *places, len(stream)]) if i < j]
    every: list[bytes] = []
    some: list[bytes] = []
    all_of_it, part_of_it = ScriptedSource(), ScriptedSource()
    all_of_it.body.tap_events(lambda event: every.append(event.raw))
    part_of_it.body.tap_events(lambda event: some.append(event.raw), containing=b'"usage"')
    assert flow(all_of_it.body, all_of_it, *pieces).data == stream
    assert flow(part_of_it.body, part_of_it, *pieces).data == stream
    assert some == [raw for raw in every if b'"usage"' in raw]


def test_whole_json_reply_is_shown_only_if_it_contains_what_is_looked_for() -> None:
    body = Body.of(b'{"a": 1}', media_type="application/json")
    events: list[Any] = []
    body.tap_events(lambda event: events.append("a"), containing=b'"a"')
    body.tap_events(lambda event: events.append("b"), containing=b'"b"')
    body.take()
    assert events == ["a"]


def raises(_: object) -> None:
    raise LookupError("a mistake of a filter")


def also_raises(_: object) -> None:
    raise LookupError("another mistake")


def test_tap_that_raises_is_dropped_and_counted_and_the_stream_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = ScriptedSource()
    seen: list[bytes] = []
    events: list[bytes] = []
    source.body.tap_bytes(raises)
    source.body.tap_bytes(seen.append)
    source.body.tap_events(also_raises)
    source.body.tap_events(lambda event: events.append(event.data))
    sink = flow(source.body, source, b"data: 1\n\n", b"data: 2\n\n")
    assert sink.data == b"data: 1\n\ndata: 2\n\n"
    assert sink.is_complete
    assert b"".join(seen) == sink.data
    assert events == [b"1", b"2"]
    assert source.body.dropped_taps == 2
    assert [record.message for record in caplog.records] == ["tap_dropped"] * 2


def test_event_too_large_drops_the_taps_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reply_module, "MAX_EVENT_BYTES", 100)
    source = ScriptedSource()
    events: list[Event] = []
    source.body.tap_events(events.append)
    data = b"data: " + b"x" * 500 + b"\n\ndata: 2\n\n"
    sink = flow(source.body, source, *piecewise(data, 50))
    assert sink.data == data
    assert sink.is_complete
    assert events == []
    assert source.body.dropped_taps == 1
    assert [record.message for record in caplog.records] == ["event_taps_dropped"]


# JSON, other types, compression


@pytest.mark.parametrize("media_type", ["application/json", "application/problem+json"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_json_reply_is_one_event_at_its_end(media_type: str, size: int) -> None:
    data = b'{"usage": {"n": 1}}\n\n'
    source = ScriptedSource(media_type=media_type)
    events: list[Any] = []
    source.body.tap_events(lambda event: events.append(event.json()))
    sink = ListSink()
    source.body.attach(sink)
    source.feed(*piecewise(data, size))
    assert events == []
    source.finish()
    assert events == [{"usage": {"n": 1}}]
    assert sink.data == data


def test_whole_json_reply_is_one_event() -> None:
    body = Body.of(b'{"a": 1}', media_type="application/json")
    events: list[Any] = []
    body.tap_events(lambda event: events.append(event.json()))
    assert body.take() == b'{"a": 1}'
    assert events == [{"a": 1}]


def test_whole_json_reply_past_the_bound_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reply_module, "MAX_EVENT_BYTES", 4)
    body = Body.of(b'{"a": 1}', media_type="application/json")
    events: list[Any] = []
    body.tap_events(events.append)
    assert body.take() == b'{"a": 1}'
    assert events == []
    assert body.dropped_taps == 1


@pytest.mark.parametrize("media_type", ["", "text/plain", "audio/mpeg"])
def test_other_replies_have_no_events(media_type: str) -> None:
    source = ScriptedSource(media_type=media_type)
    events: list[Any] = []
    source.body.tap_events(events.append)
    sink = flow(source.body, source, STREAM)
    assert sink.data == STREAM
    assert events == []
    assert source.body.dropped_taps == 0


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", deflated)],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_compressed_reply_is_opened_for_taps_alone(
    encoding: str, pack: Callable[[bytes], bytes], size: int
) -> None:
    packed = pack(STREAM)
    source = ScriptedSource(encoding=encoding)
    events: list[Any] = []
    source.body.tap_events(lambda event: events.append(event.data))
    sink = flow(source.body, source, *piecewise(packed, size))
    assert sink.data == packed
    assert events == [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]


def test_events_of_a_compressed_stream_are_shown_as_they_come() -> None:
    packer = zlib.compressobj(wbits=31)
    source = ScriptedSource(encoding="gzip")
    events: list[Any] = []
    source.body.tap_events(lambda event: events.append(event.data))
    source.body.attach(ListSink())
    for number in (b"1", b"2"):
        source.feed(packer.compress(b"data: " + number + b"\n\n"))
        source.feed(packer.flush(zlib.Z_SYNC_FLUSH))
        assert events[-1] == number


def test_large_compressed_json_is_shown_whole() -> None:
    data = b'{"text": "' + b"a" * 1_000_000 + b'"}'
    packed = gzip.compress(data)
    body = Body.of(packed, media_type="application/json")
    events: list[Any] = []
    body.encoding = "gzip"
    body.tap_events(lambda event: events.append(len(event.json()["text"])))
    assert body.take() == packed
    assert events == [1_000_000]


def test_compressed_bomb_costs_only_the_taps(caplog: pytest.LogCaptureFixture) -> None:
    packed = gzip.compress(b"data: " + b"x" * (20 * 1024 * 1024))
    source = ScriptedSource(encoding="gzip")
    events: list[Any] = []
    source.body.tap_events(events.append)
    sink = flow(source.body, source, packed)
    assert sink.data == packed
    assert events == []
    assert source.body.dropped_taps == 1


def test_reply_that_lies_about_its_compression_passes_untouched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = ScriptedSource(encoding="gzip")
    events: list[Any] = []
    source.body.tap_events(events.append)
    sink = flow(source.body, source, STREAM)
    assert sink.data == STREAM
    assert sink.is_complete
    assert source.body.dropped_taps == 1


def test_unknown_compression_passes_untouched_and_unseen() -> None:
    source = ScriptedSource(encoding="br")
    events: list[Any] = []
    source.body.tap_events(events.append)
    assert flow(source.body, source, b"\x01\x02").data == b"\x01\x02"
    assert events == []


# Maps


def test_taps_below_a_map_see_the_original_and_those_above_the_result() -> None:
    source = ScriptedSource(length=3)
    below: list[bytes] = []
    above: list[bytes] = []
    source.body.tap_bytes(below.append)
    source.body.map(Upper())
    source.body.tap_bytes(above.append)
    assert source.body.length is None  # the announced length is no longer true
    sink = flow(source.body, source, b"a", b"bc")
    assert b"".join(below) == b"abc"
    assert b"".join(above) == sink.data == b"ABC."


def test_what_a_map_adds_at_the_end_passes_the_maps_behind_it() -> None:
    class Lower:
        def feed(self, data: bytes) -> bytes:
            return b"<" + data + b">"

        def finish(self) -> bytes:
            return b"!"

    source = ScriptedSource()
    source.body.map(Upper())
    source.body.map(Lower())
    assert flow(source.body, source, b"a").data == b"<A><.>!"


def test_map_that_holds_bytes_back_writes_nothing_empty() -> None:
    class Last:
        def __init__(self) -> None:
            self.held = b""

        def feed(self, data: bytes) -> bytes:
            self.held += data
            return b""

        def finish(self) -> bytes:
            return self.held

    source = ScriptedSource()
    source.body.map(Last())
    sink = flow(source.body, source, b"a", b"b")
    assert sink.pieces == [b"ab"]


class Failing:
    def __init__(self, where: str) -> None:
        self.where = where

    def feed(self, data: bytes) -> bytes:
        if self.where == "feed":
            raise LookupError("a mistake of a filter")
        return data

    def finish(self) -> bytes:
        if self.where == "finish":
            raise LookupError("a mistake of a filter")
        return b""


@pytest.mark.parametrize("where", ["feed", "finish"])
@pytest.mark.parametrize("is_held", [False, True])
def test_map_that_raises_breaks_the_answer_off(
    where: str, is_held: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source, sink = ScriptedSource(), ListSink()
    owner = owned(source)
    source.body.map(Failing(where))
    if is_held:
        source.feed(b"one")
    source.body.attach(sink)
    if not is_held:
        source.feed(b"one")
    source.finish()
    assert sink.error is not None
    assert (sink.error.status, sink.error.code) == (500, "internal_error")
    assert not sink.is_complete
    assert owner.ends == [(Outcome.ABORTED, sink.error)]
    assert [record.message for record in caplog.records] == ["map_failed"]


def test_map_that_raises_midway_stops_the_source(caplog: pytest.LogCaptureFixture) -> None:
    source = ScriptedSource()
    source.body.map(Failing("feed"))
    source.body.attach(ListSink())
    source.feed(b"one")
    assert source.is_aborted


def test_map_that_raises_on_a_whole_body_ends_it_as_aborted() -> None:
    body, owner = Body.of(b"x"), Owner()
    body.owned_by(owner)
    body.map(Failing("feed"))
    with pytest.raises(LookupError):
        body.take()
    assert owner.ends == [(Outcome.ABORTED, None)]


# Whole bodies


@pytest.mark.parametrize("media_type", [SSE, "application/json", "text/plain"])
@pytest.mark.parametrize("data", [b"", b"{}", STREAM])
def test_taking_gives_the_bytes_and_events_that_attaching_gives(
    media_type: str, data: bytes
) -> None:
    results = []
    for take in (True, False):
        body = Body.of(data, media_type=media_type)
        events: list[Any] = []
        pieces: list[bytes] = []
        body.tap_bytes(pieces.append)
        body.map(Upper())
        body.tap_events(lambda event, to=events: to.append(event.data))  # type: ignore[misc]
        owner = Owner()
        body.owned_by(owner)
        if take:
            taken = body.take()
        else:
            sink = ListSink()
            body.attach(sink)
            taken = sink.data
        assert owner.ends == [(Outcome.COMPLETED, None)]
        results.append((taken, events, b"".join(pieces)))
    assert results[0] == results[1]
    assert results[0][0] == data.upper() + b"."


def test_reply_made_here_is_whole_and_says_what_it_is() -> None:
    reply = Reply.of(404, b"{}", media_type="application/json")
    assert reply.status == 404
    assert reply.headers.items() == [("content-type", "application/json")]
    assert reply.body.is_whole
    assert reply.body.length == 2
    assert not reply.body.is_stream
    assert repr(reply) == "<Reply 404 <Body application/json held>>"
    reply.discard()
    assert repr(reply.body) == "<Body application/json ended>"


def test_reply_is_discarded_through_its_body() -> None:
    source = ScriptedSource()
    owner = owned(source)
    source.feed(b"one")
    Reply(200, Headers(), source.body).discard()
    assert source.is_aborted
    assert owner.ends == [(Outcome.DISCARDED, None)]


# The first event


async def test_first_event_is_seen_without_being_taken() -> None:
    source, sink = ScriptedSource(), ListSink()
    source.feed(b"data: 1\n\nda")
    event = await source.body.first_event()
    assert event is not None
    assert event.data == b"1"
    source.body.attach(sink)
    assert sink.data == b"data: 1\n\nda"


async def test_first_event_waits_for_the_pieces_it_comes_in() -> None:
    source = ScriptedSource()
    source.feed(b"data")
    waiting = asyncio.ensure_future(source.body.first_event())
    for piece in (b": 1", b"\n", b"\ndata: 2\n\n"):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        assert not source.is_paused
        source.feed(piece)
        assert source.is_paused
    event = await waiting
    assert event is not None
    assert event.data == b"1"


async def test_first_event_is_none_when_the_stream_has_none() -> None:
    source = ScriptedSource()
    waiting = asyncio.ensure_future(source.body.first_event())
    await asyncio.sleep(0)
    source.finish(b": nothing\n\n")
    assert await waiting is None


async def test_first_event_may_be_the_last_without_a_blank_line() -> None:
    source = ScriptedSource()
    source.finish(b"data: 1")
    event = await source.body.first_event()
    assert event is not None
    assert event.data == b"1"


async def test_first_event_raises_what_the_source_failed_with() -> None:
    source, error = ScriptedSource(), broken()
    waiting = asyncio.ensure_future(source.body.first_event())
    await asyncio.sleep(0)
    source.fail(error)
    with pytest.raises(type(error)) as raised:
        await waiting
    assert raised.value is error


async def test_first_event_holds_no_more_than_its_bound() -> None:
    source = ScriptedSource()
    source.feed(b"data: " + b"x" * 200)
    with pytest.raises(EventTooLarge):
        await source.body.first_event(max_bytes=100)


async def test_first_event_returns_none_when_the_body_is_discarded_meanwhile() -> None:
    source = ScriptedSource()
    waiting = asyncio.ensure_future(source.body.first_event())
    await asyncio.sleep(0)
    source.body.discard()
    async with asyncio.timeout(2):
        assert await waiting is None


# The beginning of a body, without taking it

TEXT = b'{"error": {"code": "overloaded", "message": "try later"}}'


def replied(source: ScriptedSource) -> Reply:
    return Reply(503, Headers(), source.body)


GZIPPED = gzip.compress(TEXT, mtime=0)  # part of test names: the same in every process


@pytest.mark.parametrize(
    ("encoding", "wire", "expected"),
    [
        ("", TEXT, TEXT),
        ("gzip", GZIPPED, TEXT),
        ("x-gzip", GZIPPED, TEXT),
        ("deflate", zlib.compress(TEXT), TEXT),
        ("gzip", GZIPPED[:-9], TEXT),  # cut inside of its end
        ("gzip", GZIPPED[:4], b""),
        ("gzip", b"not what it says", b"not what it says"),
        ("br", b"nobody here reads it", b"nobody here reads it"),
        ("", b"", b""),
    ],
)
async def test_beginning_of_a_body_is_read_decompressed_and_stays_in_hand(
    encoding: str, wire: bytes, expected: bytes
) -> None:
    source, sink = ScriptedSource(encoding=encoding), ListSink()
    source.finish(wire)
    reply = replied(source)
    assert reply.peeked() == expected
    assert await reply.beginning() == expected
    reply.body.attach(sink)
    assert (sink.data, sink.is_complete) == (wire, True)


@pytest.mark.parametrize("encoding", ["", "gzip"])
async def test_beginning_is_bounded_whatever_there_is_or_it_expands_to(encoding: str) -> None:
    text = b"0123456789" * 100_000
    source = ScriptedSource(encoding=encoding)
    source.finish(gzip.compress(text) if encoding else text)
    for found in (replied(source).peeked(200), await replied(source).beginning(200)):
        assert 0 < len(found) <= 200
        assert text.startswith(found)


async def test_peeking_waits_for_nothing_and_beginning_for_what_is_still_to_come() -> None:
    source = ScriptedSource()
    source.feed(TEXT[:10])
    reply = replied(source)
    assert reply.peeked() == TEXT[:10]
    waiting = asyncio.ensure_future(reply.beginning(within_s=5.0))
    for start in range(10, len(TEXT) - 10, 10):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        source.feed(TEXT[start : start + 10])
    await asyncio.sleep(0)
    source.finish(TEXT[start + 10 :])
    assert await waiting == TEXT


async def test_beginning_is_there_as_soon_as_it_is_long_enough() -> None:
    source = ScriptedSource()
    waiting = asyncio.ensure_future(replied(source).beginning(8, within_s=5.0))
    await asyncio.sleep(0)
    source.feed(TEXT)
    assert await waiting == TEXT[:8]
    assert source.is_paused


async def test_beginning_that_does_not_come_is_awaited_for_a_moment_only() -> None:
    source = ScriptedSource()
    source.feed(TEXT[:10])
    async with asyncio.timeout(5.0):
        assert await replied(source).beginning(within_s=0.01) == TEXT[:10]
    source.finish(TEXT[10:])
    assert replied(source).peeked() == TEXT


async def test_beginning_of_a_body_that_breaks_off_or_is_given_up_is_what_there_is() -> None:
    for end, left in (("fail", TEXT[:10]), ("discard", b"")):
        source = ScriptedSource()
        source.feed(TEXT[:10])
        waiting = asyncio.ensure_future(replied(source).beginning(within_s=5.0))
        await asyncio.sleep(0)
        if end == "fail":
            source.fail()
        else:
            source.body.discard()
        assert await waiting == left


async def test_who_is_cancelled_while_it_waits_for_the_beginning_leaves_the_body_as_it_is() -> None:
    source = ScriptedSource()
    reply = replied(source)
    waiting = asyncio.ensure_future(reply.beginning(within_s=5.0))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    source.finish(TEXT)
    assert reply.peeked() == TEXT
